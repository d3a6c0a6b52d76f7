"""docs/cluster.md: if this fails, the batch file that a user copies fails, or loses a signal.

The page's ```bash block is run with stand-ins for Slurm, Ray and Python; its ```sh blocks are
parsed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, users_environment
from tests.test_docs import blocks

PAGE = (ROOT / "docs" / "cluster.md").read_text()
(BATCH,) = [text for language, text in blocks(PAGE) if language == "bash"]

# Each says what it was asked; srun does it, Ray is there at once, Python needs a moment to end.
STAND_INS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "ray": "",
    "hostname": "echo first",
    "python": "trap 'sleep 0.3; exit 143' TERM; echo started >&2; sleep 60 & wait",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Lay the stand-ins before everything else; return the environment of a job."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, does in STAND_INS.items():
        asked = "" if name == "hostname" else f'echo "{name} $*" >> "$LOG"\n'
        (folder / name).write_text(f"#!/bin/bash\n{asked}{does}\n")
        (folder / name).chmod(0o755)
    of_slurm = {"JOB_ID": "30007", "NNODES": "4", "GPUS_ON_NODE": "4", "CPUS_PER_TASK": "16"}
    return {
        **users_environment(),
        "LOG": str(tmp_path / "log"),
        **{f"SLURM_{name}": value for name, value in of_slurm.items()},
    }


@pytest.fixture
def failing_ray(tmp_path: Path, job: dict[str, str]) -> None:
    """Let Ray fail at what $FAILS names; no head means no answer to a health check either."""
    ray = tmp_path / ".venv" / "bin" / "ray"
    ray.write_text(ray.read_text() + 'case " $FAILS " in *" $1 "*) exit 1;; esac\n')


def asked(tmp_path: Path, name: str) -> list[list[str]]:
    lines = (tmp_path / "log").read_text().splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{name} ")]


def test_the_batch_file_starts_ray_and_hands_the_signal_on(
    tmp_path: Path, job: dict[str, str]
) -> None:
    with subprocess.Popen(
        ["bash", "-c", BATCH],
        cwd=tmp_path,
        env=job,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as batch:
        assert batch.stderr is not None
        assert batch.stderr.readline() == "started\n"
        while len(asked(tmp_path, "ray")) < 4:  # they are started beside
            time.sleep(0.01)
        batch.send_signal(signal.SIGTERM)
        assert batch.wait(30) == 143
        with suppress(ProcessLookupError):  # if nothing of it is left
            os.killpg(batch.pid, signal.SIGKILL)
    joined = f"--address=first:{20007}"
    starts = [words for words in asked(tmp_path, "ray") if words[0] == "start"]
    assert sorted("--head" in words for words in starts) == [False, True]
    (other,) = [words for words in starts if "--head" not in words]
    assert joined in other
    assert not any(word.startswith("--include-dashboard") for word in other)  # Ray refuses it there
    (embed,) = asked(tmp_path, "python")
    assert embed[:3] == ["scripts/embed.py", "--ray", "first:20007"]


@pytest.mark.usefixtures("failing_ray")
@pytest.mark.parametrize(
    ("fails", "then"),
    [
        ("get-auth-token", ["get-auth-token"]),
        ("start health-check", ["get-auth-token", "health-check", "start"]),
    ],
    ids=["no token", "a head that dies"],
)
def test_the_batch_file_ends_if_ray_does_not_start(
    tmp_path: Path, job: dict[str, str], fails: str, then: list[str]
) -> None:
    # Without the loop's own pause: the head's end may be seen at the second look only.
    (tmp_path / ".venv" / "bin" / "sleep").symlink_to("/bin/true")
    done = subprocess.run(
        ["bash", "-c", BATCH],
        cwd=tmp_path,
        env=job | {"FAILS": fails},
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert sorted({words[0] for words in asked(tmp_path, "ray")}) == then
    assert not asked(tmp_path, "python")


def test_one_machine_is_joined_by_no_other(tmp_path: Path, job: dict[str, str]) -> None:
    (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/bash\n")
    done = subprocess.run(
        ["bash", "-c", BATCH],
        cwd=tmp_path,
        env=job | {"SLURM_NNODES": "1"},
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0
    assert len(asked(tmp_path, "srun")) == 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_knows_the_options_of_the_page() -> None:
    commands = importlib.import_module("ray.scripts.scripts")
    known = {word for option in commands.start.params for word in option.opts}
    options = "".join(re.findall(r"^options=.*|ray start .*", BATCH, re.MULTILINE))
    table = "".join(line for line in PAGE.splitlines() if line.startswith("| `--"))
    said = {*re.findall(r"--[a-z-]+", options + table)}
    assert len(said) == 13
    assert said <= known
    assert "--generate" in {word for one in commands.get_auth_token.params for word in one.opts}


def test_our_scripts_know_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(one for one in BATCH.splitlines() if one.startswith("python "))
    words = shlex.split(line.rstrip("& "))
    known: set[str] = set()

    def parse(parser: argparse.ArgumentParser, *_: object) -> None:
        known.update(word for action in parser._actions for word in action.option_strings)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for script in ("embed", "resume"):
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(f"scripts.{script}").main([])
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("text", [text for language, text in blocks(PAGE) if language == "sh"])
def test_what_is_typed_in_a_shell_is_a_command(text: str) -> None:
    assert subprocess.run(["sh", "-n", "-c", text]).returncode == 0
