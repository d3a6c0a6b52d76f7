"""Released models are proven by digest: if these fail, any file with the right name passes for one.

The catalogs are made up: untrained models stand where the published files do. Before, no
digest was asked: a file passed by its name, and a download by its shape.
"""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from lib.catalog import LIKE_RELEASED, RELEASED
from lib.embeddings import open_run
from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from lib.ledger.questions import questions
from lib.models.untrained import make_folder, make_model
from schema.migrations.versions import v2
from tests.catalogs import release
from tests.conftest import ROOT, Answer, Place, Script

NAME = "esm2_t33_650M_UR50D"
FALSE_NAME = f"{NAME} (not the released file)"

# As read in Synthyra/FastPLMs and DeepGraphLearning/torchdrug; by hand, not from lib/catalog.py.
PT = """
esm2_t6_8M_UR50D 30099493 46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928
esm2_t12_35M_UR50D 134095705 7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e
esm2_t30_150M_UR50D 592774773 881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62
esm2_t33_650M_UR50D 2604537549 ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c
esm2_t36_3B_UR50D 5678116398 7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500
esm2_t48_15B_UR50D None af61a9c0b792ae50e244cde443b7f4ac
"""
REGRESSIONS = """
esm2_t6_8M_UR50D 1511 8f7a4557d57713b97ba0e484303007efb7230d25299c0ac47a0a1b12a87bbb9d
esm2_t12_35M_UR50D 1959 16641e05d830d0ce863dd152dbb8c2f3ddfa3c3ec2a66080152c8abad01d8585
esm2_t30_150M_UR50D 3431 6a604b96722ed052eef8a094ad90b275ba2e987d406315dbed0bdc6b3c4238a7
esm2_t33_650M_UR50D 3687 8ffe6edbd4173dc8d45c2cd5cb27d43aad77ec26b4c768200c58ae1f96693575
esm2_t36_3B_UR50D 6759 4da500eab246481dc9c8c95bc7b1d02f2803d761c380b0e95186d4a07d0fc84e
"""
REVISIONS = """
facebook/esm2_t6_8M_UR50D c731040fcd8d73dceaa04b0a8e6329b345b0f5df
facebook/esm2_t12_35M_UR50D 6fbf070e65b0b7291e7bbcd451118c216cff79d8
facebook/esm2_t30_150M_UR50D a695f6045e2e32885fa60af20c13cb35398ce30c
facebook/esm2_t33_650M_UR50D 08e4846e537177426273712802403f7ba8261b6c
facebook/esm2_t36_3B_UR50D 476b639933c8baad5ad09a60ac1a87f987b656fc
"""
HUB = """
model.safetensors 31384292 24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189
model.safetensors 136008798 e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0
model.safetensors 595257706 c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566
model.safetensors 2609506392 a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0
pytorch_model-00001-of-00002.bin 9976735419 0f971f11c449d21422aa982b791619c10351972992c735f4c3cd43fe09790412
pytorch_model-00002-of-00002.bin 1390347055 7560b46fc383c691fb74b915b7d4bcef40d3df181447f16ba4b298845e308d0c
"""  # noqa: E501


def lines(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def test_the_catalog_has_the_published_sizes_and_digests() -> None:
    models = RELEASED.values()
    files = [model.file for model in models]
    assert [[f.name.removesuffix(".pt"), str(f.bytes), f.digest] for f in files] == lines(PT)
    assert [f.algorithm for f in files] == ["sha256"] * 5 + ["md5"]
    assert [f.name for f in files] == [f"{name}.pt" for name in RELEASED]
    beside = [model.regression for model in models if model.regression]
    stems = [f.name.removesuffix("-contact-regression.pt") for f in beside]
    numbers = [[str(f.bytes), f.digest] for f in beside]
    assert [[stem, *rest] for stem, rest in zip(stems, numbers, strict=True)] == lines(REGRESSIONS)
    hubs = [model.hub for model in models if model.hub]
    assert [[hub.repository, hub.revision] for hub in hubs] == lines(REVISIONS)
    weights = [file for hub in hubs for file in hub.weights]
    assert [[f.name, str(f.bytes), f.digest] for f in weights] == lines(HUB)
    assert {file.algorithm for file in [*beside, *weights]} == {"sha256"}


def test_the_migration_proves_by_the_digests_of_the_catalog() -> None:
    files = [model.file for model in RELEASED.values()]
    assert tuple(f.digest for f in files if f.algorithm == "sha256") == v2._RELEASED


@pytest.fixture
def published(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The untrained small_model, as if it had been published as the 650M model."""
    monkeypatch.setitem(RELEASED, NAME, release(small_model))
    return small_model


@pytest.fixture
def impostor(published: Path, other_model: Path, tmp_path: Path) -> Path:
    """A file with a released name, shape and size, and other numbers in it."""
    path = tmp_path / "elsewhere" / f"{NAME}.pt"
    path.parent.mkdir()
    shutil.copy(other_model, path)
    assert path.stat().st_size == published.stat().st_size
    return path


def embed(script: Script, place: Place, model: object, *flags: str) -> Answer:
    """Embed one record of a file that the page's question asks for."""
    fasta = place.folder / "proteins.fasta"
    fasta.write_text(">one\nMKTAYIAKQRQISFVKSHFSRQ\n")
    return script("embed", "--json", "--esm-model", str(model), "--input", fasta, *flags)


def row(script: Script, model: object) -> list[str]:
    """The words of detect's line about `released`."""
    printed = script("detect", "--esm-model", str(model))
    assert printed.status == 0, printed.err
    (found,) = [line for line in printed.out.splitlines() if line.startswith("released")]
    return found.split()


def detected_name(script: Script, model: object) -> str:
    line = script("detect", "--esm-model", str(model)).out.splitlines()[1]
    return line.removeprefix("name").strip().split("  ")[0]


# ---- What is proven


def test_detect_proves_a_file_by_its_digest_whatever_its_name(
    script: Script, published: Path
) -> None:
    assert row(script, published) == ["released", "yes", "(sha256)", NAME]
    found = script("detect", "--json", "--esm-model", published).json
    assert (found["released"], found["released_name"], found["released_by"]) == (
        True,
        NAME,
        "sha256",
    )


def test_a_run_with_the_published_file_has_its_name_on_record(
    script: Script, place: Place, published: Path
) -> None:
    answer = embed(script, place, published)
    assert answer.status == 0, answer.err
    config = answer.json["model"]
    assert (config["name"], config["released"]) == (NAME, True)
    assert f"model {NAME}: sha256 {config['sha256']}, released: yes (by digest)" in answer.err
    (model,) = script("query", "--json", "select name, released from models").json
    assert model == {"name": NAME, "released": 1}
    assert open_run(str(place.database), 1).model["released"] is True


def test_a_file_without_a_sha256_in_the_catalog_is_proven_by_md5(
    script: Script,
    place: Place,
    small_model: Path,
    other_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RELEASED, NAME, release(small_model, algorithm="md5"))
    assert row(script, small_model) == ["released", "yes", "(md5)", NAME]
    assert row(script, other_model) == ["released", "no", "(md5)"]
    model = embed(script, place, small_model).json["model"]
    assert (model["name"], model["released"]) == (NAME, True)
    assert embed(script, place, other_model).json["model"]["released"] is False


def test_a_hugging_face_folder_is_proven_by_the_digests_of_its_weights(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.folder / "folder"
    make_folder(folder, 2, 64, 4)
    monkeypatch.setitem(RELEASED, NAME, release(small_model, folder))
    assert row(script, folder) == ["released", "yes", "(sha256)", NAME]
    model = embed(script, place, folder).json["model"]
    assert (model["name"], model["released"]) == (NAME, True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"token_dropout": False}))
    assert row(script, folder) == ["released", "no", "(shape)"]
    other = place.folder / "other"
    make_folder(other, 2, 64, 4, seed=1)
    assert row(script, other) == ["released", "no", "(sha256)"]
    (other / "model.safetensors").rename(other / "model-1.safetensors")
    index = {"weight_map": {"all": "model-1.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    assert row(script, other) == ["released", "no", "(files)"]


# ---- What is not


def test_a_false_name_is_shown_as_such_everywhere(
    script: Script, place: Place, impostor: Path
) -> None:
    assert detected_name(script, impostor) == FALSE_NAME
    assert row(script, impostor) == ["released", "no", "(sha256)"]
    answer = embed(script, place, impostor)
    assert answer.status == 0, answer.err
    assert (answer.json["model"]["name"], answer.json["model"]["released"]) == (NAME, False)
    assert f"model {FALSE_NAME}: sha256 " in answer.err
    (run,) = script("history", "--json").json
    assert (run["model"], run["released"]) == (f"{FALSE_NAME} (untrained)", 0)
    assert FALSE_NAME in script("history").out
    fields = script("history", "--run", "1").out
    assert f"{FALSE_NAME} (untrained)\nreleased             no\n" in fields
    (usage,) = script("query", "--json", "select * from model_usage").json
    assert (usage["model"], usage["released"]) == (f"{FALSE_NAME} (untrained)", 0)
    (audited,) = script("query", "--json", "select * from checkpoint_audit").json
    assert (audited["model"], audited["problem"]) == (FALSE_NAME, None)
    assert script("report", "--run", "1", "--to", place.folder / "run.html").status == 0
    page = (place.folder / "run.html").read_text()
    assert f"The weights have the name {NAME} and are not the released file." in page
    assert FALSE_NAME in page


def test_a_file_where_releases_lie_needs_the_digest_too(
    script: Script, place: Place, impostor: Path
) -> None:
    place.set("model", "weights_directory", impostor.parent)
    assert detected_name(script, NAME) == FALSE_NAME
    model = embed(script, place, NAME).json["model"]
    assert (model["name"], model["released"]) == (NAME, False)


def test_validate_shows_a_false_name(script: Script, impostor: Path) -> None:
    assert script("validate", "--esm-model", impostor).out.startswith(f"model {FALSE_NAME} (untr")


def test_a_false_name_with_another_shape_is_refused(
    script: Script, place: Place, tall_model: Path
) -> None:
    path = place.folder / f"{NAME}.pt"
    shutil.copy(tall_model, path)
    answer = script("detect", "--esm-model", path)
    assert answer.status == 2
    assert answer.error == f"{path}: num_layers is 3, that of {NAME} is 33"
    folder = place.folder / NAME
    make_folder(folder, 2, 64, 4)
    answer = script("detect", "--esm-model", folder)
    assert answer.error == f"{folder}: num_layers is 2, that of {NAME} is 33"


def test_a_path_of_another_size_is_not_released_and_no_digest_is_taken(
    script: Script, published: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = place.folder / "longer.pt"
    make_model(longer, 2, 64, 4, token_dropout=True, dtype=torch.float16)

    def refuse(*_: object) -> str:
        raise AssertionError("a digest was taken")

    monkeypatch.setattr("lib.models.held_file.HeldFile.sha256", refuse)
    monkeypatch.setattr("lib.models.released.file_md5", refuse)
    assert row(script, longer) == ["released", "no", "(size)"]
    with pytest.raises(AssertionError, match="a digest was taken"):
        script("detect", "--esm-model", published)


def test_a_released_name_that_is_nowhere_is_neither(script: Script) -> None:
    found = script("detect", "--json", "--esm-model", NAME).json
    assert found["released"] is None
    assert "released" not in script("detect", "--esm-model", NAME).out


def test_a_name_like_a_released_one_is_marked_everywhere(
    script: Script, place: Place, small_model: Path
) -> None:
    like = "esm2_t12_phage_UR50D"
    path = shutil.copy(small_model, place.folder / f"{like}.pt")
    assert f"model {like} (not the released file): sha256 " in embed(script, place, path).err
    (run,) = script("history", "--json").json
    assert run["model"] == f"{like} (not the released file) (untrained)"
    # The program and the views go by one pattern, which all released names have.
    patterns = re.findall(r"GLOB '(esm2[^']+)'", (ROOT / "schema" / "views.sql").read_text())
    assert patterns == [LIKE_RELEASED] * 3
    assert all(fnmatchcase(name, LIKE_RELEASED) for name in RELEASED)


# ---- On record


def test_the_question_about_a_model_tells_proven_runs_from_others(
    script: Script, place: Place, published: Path, impostor: Path
) -> None:
    assert embed(script, place, impostor).status == 0
    assert embed(script, place, published).status == 0
    (asked,) = [one.sql for one in questions() if "650M" in one.sql]
    rows = query(str(place.database), asked).dictionaries()
    assert {one["run"]: (one["released"], one["model"]) for one in rows} == {
        1: (0, f"{NAME} (not the released file) (untrained)"),
        2: (1, f"{NAME} (untrained)"),
    }


def test_a_row_of_before_the_question_gets_its_answer(
    script: Script, place: Place, published: Path
) -> None:
    assert embed(script, place, published).status == 0
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql("UPDATE models SET released = NULL")
    assert embed(script, place, published).status == 0
    models = script("query", "--json", "select released from models").json
    assert models == [{"released": 1}]


def test_a_run_with_a_false_name_is_resumed(script: Script, place: Place, impostor: Path) -> None:
    assert embed(script, place, impostor).status == 0
    file = next(place.output.glob("run-000001/*.parquet"))
    file.unlink()
    answer = script("resume", "--run", "1", "--recompute-damaged")
    assert answer.status == 0, answer.err
    assert FALSE_NAME in answer.err
