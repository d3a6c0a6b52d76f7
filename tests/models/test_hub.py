"""Released models from the Hugging Face Hub, which a server on this machine plays.

If these fail, `source = huggingface` takes other weights than the published ones, or needs a
network for what is in the cache. The catalog is made up: an untrained folder stands where the
published one does.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lib.catalog import ReleasedModel
from lib.models.untrained import make_folder
from lib.settings import from_snapshot, load_settings, snapshot
from lib.units import size
from tests import processes
from tests.adapters import QUERY, factors, save_adapter
from tests.catalogs import put, release
from tests.conftest import Answer, Place, Script

NAME = "esm2_t6_8M_UR50D"
COMMIT = "0" * 40
WEIGHTS = "model.safetensors"
# What may be set where the tests run, and would change what the library does.
OF_THE_HUB = ("HF_", "HUGGING", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY")


@dataclass
class Hub:
    """A server that answers HEAD and GET for one repository as the Hub does."""

    url: str
    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    status: int = 200
    commit: str = COMMIT
    short: int = 0  # bytes that a GET leaves out

    @property
    def address(self) -> str:
        return f"{self.url}/facebook/untrained/resolve/{COMMIT}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model that the Hub has."""
    path = tmp_path_factory.mktemp("hub") / "folder"
    make_folder(path, 2, 64, 4)
    return path


@pytest.fixture
def entry(folder: Path, small_model: Path) -> ReleasedModel:
    """What the catalog says of it."""
    return release(small_model, folder)


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            content = self.answer()
            self.wfile.write(content[: len(content) - told.short])

        def answer(self) -> bytes:
            if "/resolve/" in self.path:  # huggingface_hub also asks for things of its own
                told.asked.append(f"{self.command} {self.path}")
            name = self.path.removeprefix(f"/facebook/untrained/resolve/{COMMIT}/")
            content = told.files.get(name)
            if told.status != 200 or content is None:
                self.send_error(404 if content is None else told.status)
                return b""
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(name.encode()).hexdigest()}"')
            self.send_header("X-Repo-Commit", told.commit)
            self.end_headers()
            return content

        def log_message(self, *_: object) -> None:
            pass

    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told = Hub(f"http://127.0.0.1:{http.server_address[1]}", files)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield told
        http.shutdown()
        thread.join()


def impatient(entry: ReleasedModel) -> None:
    """Put the model into the catalog, and let nobody wait long before a request is made again."""
    put(NAME, entry)
    time.sleep = lambda _: None


def interrupted(entry: ReleasedModel) -> None:
    """Receive SIGINT as the Hub is asked, within what huggingface_hub is built on."""
    impatient(entry)
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    processes.at_call("socket.create_connection", 1, interrupt)


@dataclass
class Caller:
    """Runs scripts with `source = huggingface`, the made-up catalog and a cache of their own."""

    place: Place
    hub: Hub
    entry: ReleasedModel
    prepare: Callable[[ReleasedModel], None] = impatient

    @property
    def cache(self) -> Path:
        return self.place.folder / "hf_home/hub"

    @property
    def snapshot(self) -> Path:
        return self.cache / f"models--facebook--untrained/snapshots/{COMMIT}"

    def __call__(self, script: str, *argv: object, **environment: str) -> Answer:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(OF_THE_HUB)
        }
        hub = {"HF_HOME": str(self.place.folder / "hf_home"), "HF_ENDPOINT": self.hub.url}
        return processes.run(
            script,
            *argv,
            *("--config", self.place.config),
            prepare=partial(self.prepare, self.entry),
            folder=self.place.folder,
            environment={**inherited, **hub, **environment},
        )

    def embed(self, *flags: object, **environment: str) -> Answer:
        fasta = self.place.folder / "one.fasta"
        fasta.write_text(">one\nMKTAYIAKQRQISFVKSHFSRQ\n")
        return self("embed", "--json", "--esm-model", NAME, "--input", fasta, *flags, **environment)


@pytest.fixture
def call(place: Place, hub: Hub, entry: ReleasedModel) -> Caller:
    place.set("model", "source", "huggingface")
    return Caller(place, hub, entry)


def test_a_released_name_is_fetched_at_its_commit_and_proven(call: Caller, hub: Hub) -> None:
    answer = call.embed("--include", "mean", "contacts")
    assert answer.status == 0, answer.err
    model = answer.json["model"]
    assert (model["name"], model["released"]) == (NAME, True)
    assert model["weights_format"] == "huggingface"
    wanted = [f"/facebook/untrained/resolve/{COMMIT}/{name}" for name in ("config.json", WEIGHTS)]
    assert hub.asked == [f"{verb} {path}" for path in wanted for verb in ("HEAD", "GET")]
    whole = size(len(hub.files[WEIGHTS]))
    assert answer.err.splitlines()[0] == (
        f"model {NAME}: facebook/untrained is not on disk, to download: {whole} from "
        f"{hub.address} to {call.cache}"
    )
    assert f"{NAME}: {whole} of {whole}" in answer.err  # the bar
    assert f"model {NAME}: sha256 {model['sha256']}, released: yes (by digest)" in answer.err


def test_what_is_in_the_cache_needs_no_network(call: Caller, hub: Hub) -> None:
    answer = call("download", "--json", "--esm-model", NAME)
    assert answer.json == {"weights": str(call.snapshot), "contact_regression": None}
    hub.asked.clear()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        answer = call.embed(**environment)
        assert answer.status == 0, answer.err
        assert answer.json["model"]["released"] is True
        assert answer.err.startswith(f"model {NAME}: {call.snapshot}\n")
    assert hub.asked == []
    detected = call("detect", "--json", "--esm-model", NAME, HF_HUB_OFFLINE="1").json
    assert (detected["released"], detected["path"]) == (True, str(call.snapshot))


def test_a_run_from_the_hub_is_resumed_offline(call: Caller) -> None:
    assert call.embed().status == 0
    next(call.place.output.glob("run-000001/*.parquet")).unlink()
    answer = call("resume", "--run", "1", "--recompute-damaged", HF_HUB_OFFLINE="1")
    assert answer.status == 0, answer.err


def test_offline_and_not_in_the_cache_is_one_line(call: Caller, hub: Hub) -> None:
    answer = call.embed(HF_HUB_OFFLINE="1")
    assert answer.status == 4
    fact = f"not in {call.cache}, and HF_HUB_OFFLINE is set"
    assert answer.error == f"{hub.address}/config.json: {fact}"
    assert hub.asked == []
    assert call("detect", "--json", "--esm-model", NAME).json["path"] is None
    answer = call("validate", "--esm-model", NAME)
    fact = "weights are not on disk (make download and embed download them)"
    assert answer.error == f"{NAME}: {fact}"


def test_nobody_at_the_address_is_one_line(call: Caller) -> None:
    answer = call.embed(HF_ENDPOINT="http://127.0.0.1:1")
    assert answer.status == 4
    assert answer.error.startswith("http://127.0.0.1:1/facebook/untrained/resolve/")
    assert answer.error.endswith("Connection refused")


def test_ctrl_c_during_a_download_is_no_fault_of_the_network(call: Caller) -> None:
    call.prepare = interrupted
    answer = call.embed()
    assert (answer.status, answer.error) == (130, "SIGINT: interrupted")


@pytest.mark.parametrize(
    ("status", "missing", "fact"),
    [
        (403, "", "config.json: HTTP status 403 Forbidden"),
        (200, WEIGHTS, f"{WEIGHTS}: HTTP status 404 Not Found"),
    ],
)
def test_error_pages_are_one_line(
    call: Caller, hub: Hub, status: int, missing: str, fact: str
) -> None:
    hub.status = status
    hub.files.pop(missing, None)
    answer = call.embed()
    assert (answer.status, answer.error) == (4, f"{hub.address}/{fact}")


def test_weights_with_another_digest_are_refused_and_kept_aside(
    call: Caller, hub: Hub, tmp_path: Path
) -> None:
    published = hub.files[WEIGHTS]
    make_folder(tmp_path / "other", 2, 64, 4, seed=1)
    hub.files[WEIGHTS] = (tmp_path / f"other/{WEIGHTS}").read_bytes()
    digest, wanted = (hashlib.sha256(one).hexdigest() for one in (hub.files[WEIGHTS], published))
    for _ in range(2):  # what was kept does not pass for the model the next time
        answer = call.embed()
        assert answer.status == 2, answer.err
        told, kept = answer.error.split("; kept as ")
        fact = f"sha256 is {digest}, that of the published {WEIGHTS} is {wanted}"
        assert told == f"{hub.address}/{WEIGHTS}: {fact}"
        assert Path(kept).name == f"model-not-released-{digest[:8]}.safetensors"
        assert Path(kept).read_bytes() == hub.files[WEIGHTS]
        assert call.cache in Path(kept).parents
        assert not (call.snapshot / WEIGHTS).is_symlink()
    assert not call.place.output.exists()
    hub.files[WEIGHTS] = published
    assert call.embed().status == 0


def test_other_weights_in_the_cache_are_shown_as_such(call: Caller, hub: Hub) -> None:
    assert call.embed().status == 0
    path = call.snapshot / WEIGHTS
    path.unlink()  # a link; what another program put there
    make_folder(call.place.folder / "other", 2, 64, 4, seed=1)
    path.write_bytes((call.place.folder / f"other/{WEIGHTS}").read_bytes())
    answer = call.embed()
    assert answer.json["model"]["released"] is False
    assert f"model {NAME} (not the released file): sha256 " in answer.err


def test_a_body_that_breaks_off_leaves_no_weights(call: Caller, hub: Hub) -> None:
    assert call.embed().status == 0
    whole = len(hub.files[WEIGHTS])
    for path in call.cache.rglob("*"):
        if path.is_file() and path.stat().st_size == whole:
            path.unlink()
    hub.files = {**hub.files}
    hub.short = 1000
    answer = call.embed()
    assert answer.status == 4, answer.err
    assert answer.error.startswith(f"{hub.address}/{WEIGHTS}: ")
    assert call("detect", "--json", "--esm-model", NAME).json["path"] is None


def test_another_commit_is_refused(call: Caller, hub: Hub) -> None:
    hub.commit = "1" * 40
    answer = call.embed()
    fact = "the server answered with another commit"
    assert (answer.status, answer.error) == (4, f"{hub.address}/config.json: {fact}")
    assert call("detect", "--json", "--esm-model", NAME).json["path"] is None
    hub.commit = COMMIT
    assert call.embed().status == 0


def test_a_path_needs_no_hub(call: Caller, small_model: Path) -> None:
    assert call("detect", "--json", "--esm-model", small_model).json["path"] == str(small_model)


# ---- The Hub's own name of a model


def test_the_hubs_name_of_a_model_is_that_model_from_the_hub(call: Caller, hub: Hub) -> None:
    call.place.set("model", "source", "fair-esm")
    name = f"facebook/{NAME}"
    absent = call("detect", "--json", "--esm-model", name).json
    assert (absent["name"], absent["path"]) == (NAME, None)
    model = call.embed("--esm-model", name).json["model"]
    assert (model["name"], model["released"]) == (NAME, True)
    assert model["weights_format"] == "huggingface"
    hub.asked.clear()
    answer = call.embed("--esm-model", name, HF_HUB_OFFLINE="1")
    assert answer.status == 0, answer.err
    assert answer.err.startswith(f"model {NAME}: {call.snapshot}\n")
    assert hub.asked == []
    next(call.place.output.glob("run-000002/*.parquet")).unlink()
    answer = call(
        "resume", "--run", "2", "--recompute-damaged", "--esm-model", name, HF_HUB_OFFLINE="1"
    )
    assert answer.status == 0, answer.err


def test_an_adapters_base_may_have_the_hubs_name(call: Caller) -> None:
    call.place.set("model", "source", "fair-esm")
    call.place.set("model", "base_model", f"facebook/{NAME}")
    lora = call.place.folder / "lora"
    save_adapter(lora, f"/training/{NAME}", factors(QUERY, 64, 64), target_modules=["query"])
    model = call.embed("--esm-model", lora).json["model"]
    assert (model["base_name"], model["weights_format"]) == (NAME, "huggingface+lora")


def test_a_model_that_is_not_known_on_the_hub_is_refused(script: Script) -> None:
    name = "esm2_t48_15B_UR50D"
    answer = script("detect", "--esm-model", f"facebook/{name}")
    fact = "no commit and digest of it on the Hub are known"
    assert (answer.status, answer.error) == (2, f"facebook/{name}: {fact}")
    answer = script("detect", "--esm-model", name, "--set", "model.source=huggingface")
    assert (answer.status, answer.error) == (2, f"facebook/{name}: {fact}")
    answer = script("detect", "--esm-model", f"other/{name}")
    assert answer.error.endswith(f"no such file or folder, and the released model is {name}")
    answer = script("detect", "--esm-model", "650M")
    assert answer.error.endswith(f"{name}, which may have facebook/ before them, but for {name}")


@pytest.mark.parametrize("option", ["esm_model", "base_model"])
def test_the_source_of_a_hub_name_is_the_hub_wherever_it_is_said(place: Place, option: str) -> None:
    said = {f"model.{option}": f"facebook/{NAME}"}
    path = {"model.esm_model": "a/path"} if option == "base_model" else {}
    for settings in (
        load_settings(place.config, path | said),
        from_snapshot(snapshot(load_settings(place.config, path | said))),
    ):
        assert getattr(settings.model, option) == NAME
        assert settings.model.source == "huggingface"
    assert load_settings(place.config, {"model.esm_model": NAME}).model.source == "fair-esm"


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("Rostlab/prot_bert", "'prot_bert' is not one of the released names esm2_t6_8M_UR50D, "),
        ("facebook/esm1b_t33_650M_UR50S", "'esm1b_t33_650M_UR50S' is not one of the released "),
        (f"other/{NAME}", f"the released model is {NAME}, or facebook/{NAME} on the Hugging Face"),
    ],
)
def test_another_name_of_the_hub_is_one_line(script: Script, name: str, fact: str) -> None:
    answer = script("detect", "--esm-model", name)
    assert answer.status == 2
    place = Path.cwd() / name
    assert answer.error.startswith(f"esm_model {place}: no such file or folder, and {fact}")
