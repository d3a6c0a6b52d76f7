"""Download of released weights, from a server on this machine.

If these fail, a user is left with half a file under the name of a model, or with a traceback
where the network broke.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from lib.catalog import RELEASED
from lib.console.bars import download_bar
from lib.errors import MachineError
from lib.files import file_sha256
from lib.models.download import download_target, download_weights
from lib.models.regression import regression_path
from lib.models.untrained import make_model
from lib.settings import load_settings
from lib.units import size
from schema.esm2_config import ModelShape
from tests.adapters import QUERY, factors, save_adapter
from tests.catalogs import release
from tests.conftest import SOME_PROTEINS, Answer, Place, Script

NAME = "esm2_t6_8M_UR50D"
# The shape of what is published in its place: half as deep, and still a download of several steps.
SHAPE = ModelShape(3, 320, 20, True)


def write_weights(path: Path, seed: int = 0) -> Path:
    """Write untrained weights of that shape, others by another seed, and their regression."""
    shape = SHAPE.num_layers, SHAPE.hidden_dim, SHAPE.attention_heads
    make_model(path, *shape, dtype=torch.float16, seed=seed)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights, and their contact regression."""
    return write_weights(tmp_path_factory.mktemp("published") / f"{NAME}.pt")


@pytest.fixture
def published(made: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the server has: the untrained weights, as if they had been published."""
    entry = release(made, shape=SHAPE, regression=regression_path(made))
    monkeypatch.setitem(RELEASED, NAME, entry)
    return made.read_bytes()


@dataclass
class Server:
    """An HTTP server on the loopback address and what it answers to every GET."""

    url: str
    status: int = 200
    body: bytes = b""
    length: str | None = None  # Content-Length, if not the body's
    asked: int = 0
    path: str = ""
    etag: str = ""  # with one, Range and If-Range are answered
    breaks_after: int | None = None  # bytes of the file, counted from its start
    breaks_every: int | None = None  # bytes of one answer
    ignores_ranges: bool = False
    redirects: dict[str, str] = field(default_factory=dict)  # path to where it sends
    fails: list[int] = field(default_factory=list)  # statuses of answers, before any other
    ranges: list[str] = field(default_factory=list)


@pytest.fixture
def server(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that config.ini names; weights are downloaded into an empty folder, in haste."""
    monkeypatch.setattr("lib.models.transfer._PAUSES", (0.0, 0.0, 0.0))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(told.status)
            if told.length != "":
                self.send_header("Content-Length", told.length or str(len(told.body)))
            self.end_headers()

        def do_GET(self) -> None:
            told.asked += 1
            told.path = self.path
            if told.path in told.redirects:
                self.send_response(302)
                self.send_header("Location", told.redirects[told.path])
                self.end_headers()
                return
            if told.asked > 1 and told.fails:
                self.send_error(told.fails.pop(0))
                return
            if told.etag:
                self.answer_in_part()
                return
            self.send_response(told.status)
            length = str(len(told.body)) if told.length is None else told.length
            if length:
                self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(told.body)

        def answer_in_part(self) -> None:
            told.ranges.append(self.headers.get("Range", ""))
            start = 0
            if self.headers.get("If-Range") == told.etag and not told.ignores_ranges:
                start = int(told.ranges[-1].removeprefix("bytes=").removesuffix("-"))
            past = start >= len(told.body)
            self.send_response(416 if past else 206 if start else 200)
            place = f"*/{len(told.body)}" if past else f"{start}-*/*"
            self.send_header("Content-Range", f"bytes {place}")
            self.send_header("Content-Length", str(max(len(told.body) - start, 0)))
            self.send_header("ETag", told.etag)
            self.end_headers()
            stop = told.breaks_after
            if told.breaks_every is not None:
                stop = start + told.breaks_every
            self.wfile.write(told.body[start:stop])

        def log_message(self, *_: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that has seen enough hangs up

    with Http(("127.0.0.1", 0), Handler) as http:
        told = Server(f"http://127.0.0.1:{http.server_address[1]}/models")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        place.set("model", "download_url", told.url)
        place.set("model", "weights_directory", place.folder / "weights")
        yield told
        http.shutdown()
        thread.join()


def embed(script: Script, place: Place) -> Answer:
    """Embed one short record."""
    fasta = place.folder / "one.fasta"
    fasta.write_text(">one\nMKTAYIAKQRQISFVKSHFSRQ\n")
    return script("embed", "--esm-model", NAME, "--input", fasta)


def left_behind(place: Place) -> list[Path]:
    """Every file of weights and of downloads, whole or not, hidden or not."""
    folders = place.folder / "weights", place.folder / "torch_home"
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_a_download_lands_in_the_weights_directory_and_is_embedded_with(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body = published
    answer = script("embed", "--json", "--esm-model", NAME, "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    assert server.path == f"/models/{NAME}.pt"
    assert answer.json["model"]["name"] == NAME
    assert [path.name for path in (place.folder / "weights").iterdir()] == [f"{NAME}.pt"]
    assert (place.folder / f"weights/{NAME}.pt").read_bytes() == published
    assert f"{NAME}: " in answer.err  # the bar


def test_weights_on_disk_are_not_downloaded_again(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body = published
    for _ in range(2):
        assert embed(script, place).status == 0
    assert server.asked == 1


def test_without_a_weights_directory_torch_hubs_cache_is_filled(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body = published
    place.set("model", "weights_directory", "")
    assert embed(script, place).status == 0
    assert left_behind(place) == [place.folder / f"torch_home/hub/checkpoints/{NAME}.pt"]


def test_a_body_without_length_is_read_to_its_end(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.length = published, ""
    assert embed(script, place).status == 0
    assert (place.folder / f"weights/{NAME}.pt").read_bytes() == published


def test_progress_counts_to_the_whole(place: Place, server: Server, published: bytes) -> None:
    server.body = published
    told: list[tuple[int, int | None]] = []
    model = load_settings(place.config, {"model.esm_model": NAME}).model
    path = download_weights(model, lambda received, total: told.append((received, total)))
    assert path == download_target(model)
    assert told[-1] == (len(published), len(published))
    assert [received for received, _ in told] == sorted({received for received, _ in told})
    assert len(told) > 5


def test_a_model_is_downloaded_without_embedding(
    script: Script, place: Place, server: Server, made: Path, published: bytes
) -> None:
    server.body = published
    weights, adapter = place.folder / f"weights/{NAME}.pt", place.folder / "lora"
    answer = script("download", "--esm-model", NAME)
    assert (answer.status, answer.out) == (0, f"weights: {weights}\n"), answer.err
    assert answer.err.startswith(f"model {NAME}: {NAME}.pt is not on disk, to download: ")
    assert left_behind(place) == [weights]
    # Its contact regression, too, and whatever is on disk only once.
    server.body = regression_path(made).read_bytes()
    answer = script("download", "--esm-model", NAME, "--include", "contacts")
    beside = f"contact regression: {regression_path(weights)}"
    assert (answer.status, answer.out) == (0, f"weights: {weights}, {beside}\n"), answer.err
    assert server.asked == 2
    assert script("validate", "--esm-model", NAME, "--include", "contacts").status == 0
    weights.unlink()
    server.body = published
    save_adapter(adapter, f"facebook/{NAME}", factors(QUERY, 320, 320), target_modules=["query"])
    answer = script("validate", "--esm-model", adapter)
    assert answer.error.startswith(f"{NAME}: weights are not on disk (make download and embed ")
    answer = script("download", "--esm-model", adapter, "--json")
    assert answer.json == {"weights": str(weights), "contact_regression": None}
    assert (weights.read_bytes(), server.asked) == (published, 3)
    assert not place.database.exists()
    assert not place.output.exists()


def embed_contacts(script: Script, place: Place, base: Path) -> Answer:
    """Embed with contacts, with weights of a released name in weights_directory."""
    folder = place.folder / "weights"
    folder.mkdir(exist_ok=True)
    shutil.copy(base, folder / base.name)
    flags = ["--input", SOME_PROTEINS, "--include", "contacts", "--set", "input.max_residues=40"]
    return script("embed", "--esm-model", NAME, *flags)


def test_the_contact_regression_is_fetched_if_contacts_are_asked_for(
    script: Script, place: Place, server: Server, made: Path, published: bytes
) -> None:
    base, regression = made, regression_path(made)
    server.body = regression.read_bytes()
    (place.folder / "weights").mkdir()
    shutil.copy(base, place.folder / "weights")
    answer = script("validate", "--esm-model", NAME, "--set", "output.include=contacts")
    assert answer.status == 2
    fact = "no contact regression on disk"
    how = "with include contacts, make download and embed download it"
    assert answer.error.endswith(f"{fact} ({how})")
    answer = embed_contacts(script, place, base)
    assert answer.status == 0, answer.err
    assert server.path == f"/regression/{regression.name}"
    assert f"{regression.stem}: " in answer.err  # the bar
    assert sorted(path.name for path in (place.folder / "weights").iterdir()) == sorted(
        [base.name, regression.name]
    )
    assert embed_contacts(script, place, base).status == 0
    assert server.asked == 1


def test_what_is_no_contact_regression_is_not_kept(
    script: Script, place: Place, server: Server, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other.pt", 2, 64, 4)
    base = tmp_path / f"{NAME}.pt"
    make_model(base, 6, 320, 20)
    server.body = other.read_bytes()
    answer = embed_contacts(script, place, base)
    assert answer.status == 2
    assert "has shape (1, 8), 6 layers of 20 heads have (1, 120)" in answer.error
    server.status = 404
    answer = embed_contacts(script, place, base)
    assert answer.status == 4
    assert answer.error.endswith("-contact-regression.pt: HTTP status 404 Not Found")
    assert [path.name for path in (place.folder / "weights").iterdir()] == [base.name]
    assert not place.output.exists()


def test_another_contact_regression_of_the_same_shape_is_refused_and_kept_aside(
    script: Script, place: Place, server: Server, made: Path, published: bytes, tmp_path: Path
) -> None:
    other = regression_path(write_weights(tmp_path / "other.pt", seed=1))
    server.body = other.read_bytes()
    answer = embed_contacts(script, place, made)
    assert answer.status == 2
    regression = regression_path(made)
    digest, wanted = file_sha256(other), file_sha256(regression)
    aside = place.folder / f"weights/{regression.stem}-not-released-{digest[:8]}.pt"
    url = f"{server.url.removesuffix('/models')}/regression/{regression.name}"
    fact = f"sha256 is {digest}, that of the published {regression.name} is {wanted}"
    assert answer.error == f"{url}: {fact}; kept as {aside}"
    assert aside.read_bytes() == server.body
    assert not place.output.exists()


def test_a_log_file_gets_a_line_a_minute(
    script: Script, place: Place, server: Server, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = published
    whole = size(len(published))
    lines = embed(script, place).err.splitlines()
    assert [one for one in lines if one.startswith(NAME)] == [f"{NAME}: {whole} of {whole}"]
    download_target(load_settings(place.config, {"model.esm_model": NAME}).model).unlink()
    monkeypatch.setattr("lib.console.bars._SECONDS_BETWEEN_LINES", 0.0)
    lines = embed(script, place).err.splitlines()
    said = [one for one in lines if one.startswith(NAME)]
    assert len(said) > 5
    assert said[:2] == [f"{NAME}: {size((1 << 20) * i)} of {whole}" for i in (1, 2)]


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(
    place: Place, server: Server, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body, server.etag, server.breaks_every = published, '"one"', len(published) // 2 + 1
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    model = load_settings(place.config, {"model.esm_model": NAME}).model
    with download_bar(NAME) as progress:
        download_weights(model, progress)
    states = terminal.getvalue().split("\r")
    assert states[-1].startswith(f"{NAME}: 100%|")
    assert states[-1].endswith("\n")
    assert sum("\n" in state for state in states) == 1


def failure(script: Script, place: Place, status: int) -> str:
    """The one line of an embedding whose download fails and leaves nothing behind."""
    answer = embed(script, place)
    assert answer.status == status, answer.err
    assert left_behind(place) == []
    return answer.error


def test_a_body_that_breaks_off_is_refused(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.length = published[: len(published) // 2], str(len(published))
    told = failure(script, place, 4)
    fact = f"broke off after {len(published) // 2} of {len(published)} bytes"
    assert told == f"{server.url}/{NAME}.pt: {fact}"


def test_a_body_that_breaks_off_without_length_is_refused(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.length = published[: len(published) // 2], ""
    told = failure(script, place, 2)
    fact = "truncated, or not a torch.save archive (no zip directory)"
    assert told == f"{server.url}/{NAME}.pt: {NAME}.pt: {fact}"


def test_a_length_that_is_too_small_is_refused(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.length = published, str(len(published) - 100)
    assert "truncated" in failure(script, place, 2)


@pytest.mark.parametrize("length", ["-1", "many", "1e6", "0x10"])
def test_a_length_that_is_no_number_is_refused(
    script: Script, place: Place, server: Server, published: bytes, length: str
) -> None:
    server.body, server.length = published, length
    assert failure(script, place, 4).startswith(f"{server.url}/{NAME}.pt: ")


@pytest.mark.parametrize(
    ("status", "fact"),
    [
        (403, "HTTP status 403 Forbidden"),
        (404, "HTTP status 404 Not Found"),
        (500, "HTTP status 500 Internal Server Error"),
    ],
)
def test_error_pages_are_refused(
    script: Script, place: Place, server: Server, published: bytes, status: int, fact: str
) -> None:
    server.status, server.body = status, published
    assert failure(script, place, 4) == f"{server.url}/{NAME}.pt: {fact}"


@pytest.mark.parametrize("body", [b"<html><body>Log in to the network</body></html>", b""])
def test_a_page_with_status_200_is_refused(
    script: Script, place: Place, server: Server, body: bytes
) -> None:
    server.body = body
    told = failure(script, place, 2)
    assert told.startswith(f"{server.url}/{NAME}.pt: {NAME}.pt: truncated, or not a torch.save")


def test_another_model_under_the_name_leaves_nothing_behind(
    script: Script, place: Place, server: Server, small_model: Path
) -> None:
    server.body = small_model.read_bytes()
    told = failure(script, place, 2)
    assert told.endswith("num_layers is 2 by checkpoint metadata, 6 by catalog")


def test_another_model_of_the_same_shape_is_refused_and_kept_aside(
    script: Script, place: Place, server: Server, published: bytes, tmp_path: Path
) -> None:
    other = write_weights(tmp_path / "other.pt", seed=1)
    server.body = other.read_bytes()
    for _ in range(2):  # what was kept does not pass for the model the next time
        answer = embed(script, place)
        assert answer.status == 2
        digest, wanted = file_sha256(other), hashlib.sha256(published).hexdigest()
        aside = place.folder / f"weights/{NAME}-not-released-{digest[:8]}.pt"
        fact = f"sha256 is {digest}, that of the published {NAME}.pt is {wanted}"
        assert answer.error == f"{server.url}/{NAME}.pt: {fact}; kept as {aside}"
        assert left_behind(place) == [aside]
        assert aside.read_bytes() == server.body
    assert not place.output.exists()
    assert script("detect", "--json", "--esm-model", aside).json["released"] is False
    server.body = published
    assert embed(script, place).status == 0


def test_a_download_is_compared_by_md5_where_no_sha256_is_known(
    script: Script,
    place: Place,
    server: Server,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    entry = release(made, shape=SHAPE, algorithm="md5")
    monkeypatch.setitem(RELEASED, NAME, entry)
    server.body = write_weights(tmp_path / "other.pt", seed=1).read_bytes()
    answer = embed(script, place)
    assert answer.status == 2
    assert f"{NAME}.pt: md5 is {hashlib.md5(server.body).hexdigest()}, that of" in answer.error
    server.body = made.read_bytes()
    answer = embed(script, place)
    assert answer.status == 0, answer.err
    assert answer.err.count("released: yes") == 1


def test_nobody_at_the_address_is_one_line(script: Script, place: Place, server: Server) -> None:
    place.set("model", "download_url", "http://127.0.0.1:1/models")
    told = failure(script, place, 4)
    assert told.startswith(f"http://127.0.0.1:1/models/{NAME}.pt: ")
    assert "Connection refused" in told


@pytest.mark.parametrize("url", ["http://[", "http://127.0.0.1:x", "http://é/", "http:///"])
def test_an_address_that_is_none_is_one_line(
    script: Script, place: Place, server: Server, url: str
) -> None:
    place.set("model", "download_url", url)
    assert failure(script, place, 4).startswith(url.rstrip("/"))


def test_a_folder_that_cannot_be_made_is_one_line(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body = published
    (place.folder / "file").write_text("in the way")
    place.set("model", "weights_directory", place.folder / "file/weights")
    answer = embed(script, place)
    assert answer.status == 4
    assert "Not a directory" in answer.error


def test_an_interrupted_download_leaves_nothing_behind(
    place: Place, server: Server, published: bytes
) -> None:
    server.body = published

    def interrupt(received: int, total: int | None) -> None:
        raise KeyboardInterrupt

    model = load_settings(place.config, {"model.esm_model": NAME}).model
    with pytest.raises(KeyboardInterrupt):
        download_weights(model, interrupt)
    assert left_behind(place) == []


def test_a_full_disk_leaves_nothing_behind(place: Place, server: Server, published: bytes) -> None:
    server.body = published

    def fill_up(received: int, total: int | None) -> None:
        raise OSError(28, "No space left on device")

    model = load_settings(place.config, {"model.esm_model": NAME}).model
    with pytest.raises(MachineError, match="No space left on device"):
        download_weights(model, fill_up)
    assert left_behind(place) == []


# ---- Continued


def broken(script: Script, place: Place, server: Server, published: bytes) -> int:
    """Break a download of `published` off at its middle; returns how many bytes it received."""
    half = len(published) // 2
    server.body, server.etag, server.breaks_after = published, '"one"', half
    answer = embed(script, place)
    fact = f"broke off after {half} of {len(published)} bytes"
    assert (answer.status, answer.error) == (4, f"{server.url}/{NAME}.pt: {fact}")
    (hidden,) = (place.folder / "weights").iterdir()
    assert hidden.name == f".download-{NAME}"
    assert server.ranges == ["", *[f"bytes={half}-"] * 3]  # three pauses, three more tries
    server.breaks_after = None
    server.ranges.clear()
    return half


def test_a_broken_download_is_continued(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    half = broken(script, place, server, published)
    answer = embed(script, place)
    assert answer.status == 0, answer.err
    assert server.ranges == [f"bytes={half}-"]
    assert left_behind(place) == [place.folder / f"weights/{NAME}.pt"]
    assert left_behind(place)[0].read_bytes() == published
    assert [path.name for path in (place.folder / "weights").iterdir()] == [f"{NAME}.pt"]


@pytest.mark.parametrize("ignores_ranges", [False, True], ids=["ranges", "no ranges"])
@pytest.mark.parametrize(
    ("fault", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(5, "Input/output error"), MachineError)],
    ids=["Ctrl-C", "EIO"],
)
def test_a_whole_file_that_could_not_be_verified_is_not_fetched_again(
    place: Place,
    server: Server,
    published: bytes,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    raised: type[BaseException],
    ignores_ranges: bool,
) -> None:
    server.body, server.etag, server.ignores_ranges = published, '"one"', ignores_ranges
    model = load_settings(place.config, {"model.esm_model": NAME}).model

    def fail(*_: object) -> None:
        raise fault

    with monkeypatch.context() as faulty:
        faulty.setattr("lib.models.download.refuse_unpublished", fail)
        with pytest.raises(raised):
            download_weights(model, lambda _received, _total: None)
    assert not download_target(model).exists()
    told: list[tuple[int, int | None]] = []
    path = download_weights(model, lambda received, total: told.append((received, total)))
    assert told == [(len(published), len(published))]
    assert server.ranges == ["", f"bytes={len(published)}-"]
    assert left_behind(place) == [path]
    assert path.read_bytes() == published


def test_a_file_that_changed_meanwhile_is_begun_again(
    script: Script,
    place: Place,
    server: Server,
    published: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(script, place, server, published)
    new = write_weights(tmp_path / f"{NAME}.pt", seed=1)
    monkeypatch.setitem(RELEASED, NAME, release(new, shape=SHAPE))
    server.body, server.etag = new.read_bytes(), '"two"'
    assert embed(script, place).status == 0
    assert left_behind(place)[0].read_bytes() == server.body


def test_a_part_longer_than_the_file_is_begun_again(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    broken(script, place, server, published)
    part = place.folder / f"weights/.download-{NAME}/{NAME}.pt"
    part.write_bytes(published + b"more")
    assert embed(script, place).status == 0
    assert left_behind(place)[0].read_bytes() == published


def test_a_continued_download_that_is_not_the_model_is_forgotten(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    broken(script, place, server, published)
    part = place.folder / f"weights/.download-{NAME}/{NAME}.pt"
    part.write_bytes(bytes(len(published)))
    server.body = published + b"\0"  # one byte to go
    failure(script, place, 2)


def test_two_downloads_at_once_fetch_it_once(
    place: Place, server: Server, published: bytes
) -> None:
    server.body, server.etag = published, '"one"'
    model = load_settings(place.config, {"model.esm_model": NAME}).model
    with ThreadPoolExecutor(2) as both:
        done = [both.submit(download_weights, model, lambda _received, _total: None) for _ in "ab"]
        assert {one.result() for one in done} == {download_target(model)}
    assert server.asked == 1
    assert download_target(model).read_bytes() == published


def test_a_proxy_of_the_environment_is_asked(
    place: Place, server: Server, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = published
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/models"))
    place.set("model", "download_url", "http://mirror.invalid/models")
    model = load_settings(place.config, {"model.esm_model": NAME}).model
    assert download_weights(model, lambda _received, _total: None).read_bytes() == published
    assert server.path == f"http://mirror.invalid/models/{NAME}.pt"


# ---- In one go, through whatever a network does


def test_a_connection_that_breaks_off_again_and_again_is_gone_on_with(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    part = len(published) // 9
    server.body, server.etag, server.breaks_every = published, '"one"', part
    answer = embed(script, place)
    assert answer.status == 0, answer.err
    assert left_behind(place)[0].read_bytes() == published
    assert server.ranges == ["", *[f"bytes={part * i}-" for i in range(1, 10)]]


def test_what_no_version_names_is_begun_again(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.length = published[: len(published) // 2], str(len(published))
    assert embed(script, place).status == 4
    assert server.asked == 4


def test_a_server_that_is_down_for_a_moment_is_asked_again(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.etag, server.breaks_every = published, '"one"', len(published) // 2 + 1
    server.fails = [503, 502]
    assert embed(script, place).status == 0
    assert left_behind(place)[0].read_bytes() == published
    assert server.asked == 4


def test_a_server_that_refuses_to_go_on_is_not_asked_again(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.etag, server.breaks_every = published, '"one"', len(published) // 2
    server.fails = [403]
    answer = embed(script, place)
    assert (answer.status, server.asked) == (4, 2)
    assert answer.error == f"{server.url}/{NAME}.pt: HTTP status 403 Forbidden"


def test_the_pauses_before_another_try_become_longer(
    place: Place, server: Server, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("lib.models.transfer._PAUSES", (1.0, 4.0))
    monkeypatch.setattr("time.sleep", slept.append)
    third = len(published) // 3
    server.body, server.etag, server.breaks_after = published, '"one"', third

    model = load_settings(place.config, {"model.esm_model": NAME}).model
    with pytest.raises(MachineError, match=f"broke off after {third} of"):
        download_weights(model, lambda _received, _total: None)
    assert slept == [1.0, 4.0]


def test_a_server_that_ignores_ranges_sends_all_of_it(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    half = broken(script, place, server, published)
    server.ignores_ranges = True
    answer = embed(script, place)
    assert answer.status == 0, answer.err
    assert server.ranges == [f"bytes={half}-"]
    assert left_behind(place)[0].read_bytes() == published


def test_redirects_are_followed_with_the_range_asked_for(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.redirects = {f"/models/{NAME}.pt": f"{server.url}/elsewhere/file"}
    half = broken(script, place, server, published)
    assert embed(script, place).status == 0
    assert server.path == "/models/elsewhere/file"
    assert server.ranges == [f"bytes={half}-"]
    assert left_behind(place)[0].read_bytes() == published


def test_redirects_in_a_circle_are_one_line(script: Script, place: Place, server: Server) -> None:
    path = f"/models/{NAME}.pt"
    server.redirects = {path: "/models/other", "/models/other": path}
    assert failure(script, place, 4).startswith(f"{server.url}/{NAME}.pt: HTTP status 302 ")


def test_a_file_larger_than_the_disk_is_refused_before_it_comes(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body, server.length = published, str(10**15)
    told = failure(script, place, 4)
    free = rf"\d+ free in {place.folder / 'weights'}"
    assert re.fullmatch(rf"\S+/{NAME}\.pt: {10**15} bytes, 0 of them received, {free}", told)
    assert server.asked == 1


def test_what_was_received_counts_as_room(
    script: Script, place: Place, server: Server, published: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = broken(script, place, server, published)
    usage = shutil.disk_usage(place.folder)
    missing = len(published) - half
    for free, status in ((missing - 1, 4), (missing, 0)):
        small = usage._replace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _path, small=small: small)
        answer = embed(script, place)
        assert answer.status == status, answer.err
    assert left_behind(place)[0].read_bytes() == published


# ---- What embed says before it does anything


def first_line(answer: Answer) -> str:
    return answer.err.splitlines()[0]


def test_embed_says_at_once_what_it_will_download(
    script: Script, place: Place, server: Server, published: bytes
) -> None:
    server.body = published
    source, target = f"{server.url}/{NAME}.pt", place.folder / f"weights/{NAME}.pt"
    what = f"{NAME}.pt is not on disk, to download: {size(len(published))}"
    fasta = place.folder / "bad.fasta"
    fasta.write_text("no header\n")
    answer = script("embed", "--esm-model", NAME, "--input", fasta)
    assert answer.status == 2
    assert first_line(answer) == f"model {NAME}: {what} from {source} to {target}"
    assert server.asked == 0
    assert first_line(embed(script, place)).startswith(f"model {NAME}: {what}")
    assert first_line(embed(script, place)) == f"model {NAME}: {target}"


@pytest.mark.parametrize(
    ("status", "length", "why"),
    [(200, "", "no Content-Length"), (403, None, "HTTP status 403 Forbidden")],
)
def test_a_size_that_a_server_does_not_tell_is_said_to_be_unknown(
    script: Script, place: Place, server: Server, status: int, length: str | None, why: str
) -> None:
    server.status, server.length = status, length
    assert f", to download: size unknown ({why}) from " in first_line(embed(script, place))


def test_without_a_network_the_size_is_said_to_be_unknown(
    script: Script, place: Place, server: Server
) -> None:
    place.set("model", "download_url", "http://127.0.0.1:1/models")
    told = first_line(embed(script, place))
    assert re.search(r", to download: size unknown \(.*Connection refused\) from http://127", told)


def test_with_nothing_said_it_is_the_3b_model(script: Script, place: Place, server: Server) -> None:
    answer = script("embed", "--input", SOME_PROTEINS)
    name = "esm2_t36_3B_UR50D"
    assert first_line(answer).startswith(f"model {name}: {name}.pt is not on disk, to download: ")
