"""The pages: if this fails, what a user copies from README or docs does or prints something else.

A page's ```console blocks run in order, in one shell, in a fresh copy of the project: `$ ` begins
a command, `> ` continues it, the lines below are what it prints, stdout and stderr as a terminal
shows them. `…` stands for what differs from day to day: within a line for anything but nothing,
alone on a line for lines. Two or more blanks are as good as any more of them: columns are as wide
as they need. After a command that fails the page shows `$ echo $?`, or make's `make: *** … Error`.
A page that needs more than a fresh copy has its own tests/test_docs_PAGE.py, which runs its blocks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cogapp import Cog  # type: ignore[import-untyped]

from tests.conftest import ROOT, users_environment
from tests.interpreter import clone

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
TARGETS = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
# Folders that a user's commands make.
MADE = ["demo", "embeddings", "models", "reports"]
SECONDS = 600
MARK = "=== end of command"


def runs_its_own(name: str, language: str) -> bool:
    """Tell whether a page has tests of its own that run its blocks of a language."""
    stem = Path(name).stem.lower()
    own = ROOT / "tests" / ("test_readme.py" if name == "README.md" else f"test_docs_{stem}.py")
    return own.is_file() and f"```{language}" in own.read_text()


# Pages whose console blocks run in a fresh copy of the project, here.
FRESH = [
    name
    for name, page in PAGES.items()
    if "\n```console\n" in page and not runs_its_own(name, "console")
]


@dataclass(frozen=True)
class Step:
    """A command of a page and what the page says that it prints."""

    command: str
    printed: str


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def steps(page: str) -> list[Step]:
    """Return the commands of a page's console blocks in their order."""
    found = []
    for language, text in blocks(page):
        if language != "console":
            continue
        start, *parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
        assert not start, f"a console block begins with a command: {start}"
        for part in parts:
            first, *rest = part.splitlines()
            further = next((i for i, s in enumerate(rest) if not s.startswith("> ")), len(rest))
            command = "\n".join([first, *(line[2:] for line in rest[:further])])
            found.append(Step(command, "\n".join(rest[further:]).strip("\n")))
    return found


def matches(expected: str, printed: str) -> bool:
    """Tell whether the page's words are what was printed, but for what `…` stands for."""
    pattern = ""
    for line in expected.splitlines():
        if line.strip() == "…":
            pattern += r"(?:[^\n]*\n)+?"
            continue
        for piece in re.split(r"(…| {2,})", line.rstrip()):
            pattern += {"…": r"[^\n]+?"}.get(
                piece, " {2,}" if piece[:2] == "  " else re.escape(piece)
            )
        pattern += "\n"
    lines = "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())
    return re.fullmatch(pattern, lines) is not None


def run_in_shell(commands: list[str], folder: Path) -> list[tuple[str, int]]:
    """Run commands in one shell; return what each printed and its status."""
    script = "".join(
        # The next command finds this one's status in $?.
        f"{command}\n{{ status=$?; printf '\\n{MARK} %s\\n' $status; (exit $status); }}\n"
        for command in commands
    )
    nowhere = "http://127.0.0.1:9"  # no page reaches the internet
    environment = {
        **users_environment(),
        "PYTHONPATH": str(folder),
        "PYTHONUNBUFFERED": "1",  # stdout and stderr in the order of a terminal
        "HOME": str(folder),
        "TORCH_HOME": str(folder / "torch_home"),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1,localhost",
    }
    log = folder / ".page.log"
    with log.open("wb") as out:
        shell = subprocess.Popen(
            ["sh", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            shell.wait(SECONDS)
        finally:
            with suppress(ProcessLookupError):  # also what a page left in the background
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    parts = re.split(rf"\n{MARK} (\d+)\n", log.read_text())
    assert len(parts) == 2 * len(commands) + 1, parts[-1]
    return [(parts[2 * i], int(parts[2 * i + 1])) for i in range(len(commands))]


@pytest.mark.parametrize("name", FRESH)
def test_commands_print_what_the_page_says(name: str, tmp_path: Path, quick_python: Path) -> None:
    page = steps(PAGES[name])
    clone(tmp_path, quick_python)
    done = run_in_shell([step.command for step in page], tmp_path)
    following = [step.command for step in page[1:]] + [""]
    faults = []
    for step, (printed, status), after in zip(page, done, following, strict=True):
        if "Traceback" in printed or not matches(step.printed, printed):
            faults.append(f"$ {step.command}\n{printed}\n-- the page says:\n{step.printed}")
        if status and after != "echo $?" and "make: ***" not in step.printed:
            faults.append(f"$ {step.command}\nstatus {status}, not on the page")
    assert not faults, f"{name}:\n" + "\n\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_no_block_goes_untested(name: str) -> None:
    for language, text in blocks(PAGES[name]):
        tested = (language == "console" and name in FRESH) or runs_its_own(name, language)
        assert tested, f"{name}: {language or 'a block without a language'}: {text}"
    for step in steps(PAGES[name]):
        # A page that says nothing but `…` compares nothing.
        assert not step.printed or re.search(r"\w", step.printed), f"{name}: $ {step.command}"


@pytest.mark.parametrize("name", PAGES)
def test_every_target_that_is_named_exists(name: str) -> None:
    for target in re.findall(r"(?:`|^\$ |^)make ([a-z]\S*?)[`\s]", PAGES[name], re.MULTILINE):
        assert target in TARGETS or f"\n{target}:" in (ROOT / "Makefile").read_text(), target


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file(name: str) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", PAGES[name]):
        if not link.startswith("https://"):
            assert (ROOT / name).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("name", PAGES)
def test_every_link_into_a_page_leads_to_a_heading(name: str) -> None:
    for link, heading in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", PAGES[name]):
        page = (ROOT / name).parent.joinpath(link) if link else ROOT / name
        titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        # As GitHub makes them.
        anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}
        assert heading in anchors, f"{link}#{heading}"


# The comparison names files of other programs.
@pytest.mark.parametrize("name", [name for name in PAGES if name != "docs/compare.md"])
def test_every_file_that_is_named_exists(name: str) -> None:
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    for place in re.findall(rf"`((?:{'|'.join(folders)})/[\w./-]*)`", PAGES[name]):
        made = place.split("/")[0] in MADE
        assert made or (ROOT / place).exists(), place


@pytest.mark.parametrize("name", ["README.md", *(one for one in PAGES if one.startswith("docs/"))])
def test_what_comes_from_the_code_is_current(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    status = Cog().main(["cog", "-I", str(ROOT), "--check", "--diff", name])
    assert status == 0, f"{capsys.readouterr().out}\n.venv/bin/cog -I . -r README.md docs/*.md"


def test_the_index_names_every_page() -> None:
    links = set(re.findall(r"\]\(([^)#\s]+\.md)\)", PAGES["docs/README.md"]))
    pages = {Path(name).name for name in PAGES if name.startswith("docs/")} - {"README.md"}
    assert links >= pages


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("run 1 finished", "run 1 finished\n", True),
        ("run 1 finished", "run 2 finished\n", False),
        ("run 1 finished", "run 1 finished\nand more\n", False),
        ("run 1 finished", "", False),
        ("", "", True),
        ("", "a word\n", False),
        ("took … s", "took 1.5 s\n", True),
        ("took … s", "took  s\n", False),
        ("took … s", "took 1.5\n s\n", False),
        ("a  b", "a        b\n", True),
        ("a  b", "a b\n", False),
        ("first\n…\nlast", "first\nsecond\nthird\nlast\n", True),
        ("first\n…\nlast", "first\nlast\n", False),
        ("a.c", "abc\n", False),
    ],
)
def test_what_counts_as_the_same(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same


def test_a_block_is_read_as_commands_and_what_they_print() -> None:
    page = (
        "Words\n```console\n$ one \\\n> two\nout\n\nmore\n$ three\n```\n\n```console\n$ four\n```\n"
    )
    assert steps(page) == [Step("one \\\ntwo", "out\n\nmore"), Step("three", ""), Step("four", "")]


def test_every_cell_of_the_comparison_can_be_followed() -> None:
    page = PAGES["docs/compare.md"]
    cited = set(re.findall(r"(\[\^\w+\])(?!:)", page))
    assert cited == set(re.findall(r"^(\[\^\w+\]):", page, re.MULTILINE))
    rows = [line for line in page.splitlines() if line.count(" | ") == 6]
    assert len(rows) > 30
    for row in rows:
        ours = row.strip("| ").split(" | ")[-1]
        assert (
            re.search(r"\]\(\.\./tests/(\w+/)?test_", ours)
            or ours == "none"
            or row.startswith("| |")
        ), row
