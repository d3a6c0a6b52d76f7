"""Checkpoint files: if this fails, a power cut leaves a row without a file, or half a file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from lib.ledger.footer import read_footer
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.torture import strace


def test_the_order_is_write_sync_rename_sync_folder_commit(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    added: list[str] = []
    true_fsync, true_link, true_unlink = os.fsync, os.link, Path.unlink

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        if "run-" in str(target):
            size = target.stat().st_size
            done.append("sync folder" if target.is_dir() else f"sync {target.name} of {size} bytes")
        true_fsync(descriptor)

    def link(source: Path, target: Path) -> None:
        done.append(f"link {source.name} as {target.name}")
        true_link(source, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        done.append(f"unlink {self.name}")
        true_unlink(self, missing_ok=missing_ok)

    def flush(session: Session, _context: object) -> None:
        added.extend(type(one).__name__ for one in session.new)

    def commit(_session: Session) -> None:
        done.append(" ".join(["commit", *added[-1:]]))
        added.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "unlink", unlink)
    event.listen(Session, "after_flush", flush)
    event.listen(Session, "before_commit", commit)
    try:
        answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS, "--json")
    finally:
        event.remove(Session, "after_flush", flush)
        event.remove(Session, "before_commit", commit)
    assert answer.status == 0, answer.err
    (file,) = (place.output / "run-000001").glob("checkpoint-*")
    temporary = ".attempt-1-0.parquet.tmp"
    start = done.index(next(line for line in done if line.startswith("sync .attempt")))
    assert done[start : start + 5] == [
        f"sync {temporary} of {file.stat().st_size} bytes",
        f"link {temporary} as {file.name}",
        f"unlink {temporary}",
        "sync folder",
        "commit Checkpoint",
    ]


@pytest.mark.skipif(not strace.is_there(), reason="strace is not there, or may not trace")
def test_the_kernel_sees_that_order_too(place: Place, small_model: Path, tmp_path: Path) -> None:
    folder = place.output / "run-000001"
    name = "checkpoint-000001.parquet"
    log = Path(f"{place.database}-wal")
    flags = ["--config", place.config, "--esm-model", small_model, "--input", SOME_PROTEINS]
    temporary = ".attempt-1-0.parquet.tmp"
    files = [folder, folder / name, folder / temporary, log]
    listed = "write,pwrite64,fsync,fdatasync,?link,?linkat,?unlink,?unlinkat"
    done = strace.run("embed", flags, listed, files, tmp_path / "calls")
    assert done.status == 0, done.err
    steps: list[str] = []
    for call in strace.calls(tmp_path / "calls"):
        # The first path by name, or else that of the descriptor.
        paths = re.findall(r"\"(/.*?)\"", call.text) or re.findall(r"<(.*?)>", call.text)
        file = Path(paths[0]).name
        step = f"{call.name.rstrip('at2')} {file}"
        if not steps or steps[-1] != step:
            steps.append(step)
    start = steps.index(f"write {temporary}")
    assert steps[start : start + 7] == [
        f"write {temporary}",
        f"fsync {temporary}",
        f"link {temporary}",
        f"unlink {temporary}",
        "fsync run-000001",
        "pwrite64 runs.sqlite-wal",
        "fdatasync runs.sqlite-wal",
    ]


def test_a_full_disk_is_one_line_and_loses_nothing_committed(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = 0
    true_write = pq.ParquetWriter.write_table

    def write(self: Any, *arguments: Any) -> None:  # noqa: ANN401
        nonlocal finished
        finished += 1
        if finished == 3:
            raise OSError(28, "No space left on device")
        true_write(self, *arguments)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write)
    flags = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS, *flags)
    assert answer.status == 4
    assert answer.error.endswith(".attempt-1-7.parquet.tmp: No space left on device")
    monkeypatch.undo()
    shown = script("history", "--run", "1", "--json").json
    assert shown["status"] == "failed"
    assert shown["attempts"][0]["error"].endswith("No space left on device")
    assert len(shown["checkpoints"]) == 2
    names = {path.name for path in (place.output / "run-000001").iterdir()}
    assert names == {".lock", "checkpoint-000001.parquet", "checkpoint-000002.parquet"}
    assert script("resume").status == 0


def test_a_read_only_folder_is_one_line(script: Script, place: Place, small_model: Path) -> None:
    place.output.write_text("a file where the folder should be")
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 4
    assert answer.error.startswith(str(place.output))
    assert script("history", "--json").json == []


def test_a_footer_whose_text_is_not_utf8_is_not_readable(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-000001.parquet"
    pq.write_table(pa.table({"record": [1, 2]}), file)
    content = file.read_bytes()
    # The name in the schema's element of the column, behind its type and the name's length.
    assert content.count(b"%\x02\x18\x06record") == 1
    file.write_bytes(content.replace(b"%\x02\x18\x06record", b"%\x02\x18\x06\xefecord"))
    with pytest.raises(ValueError, match=r"^footer not readable: its text is not UTF-8$"):
        read_footer(file)
