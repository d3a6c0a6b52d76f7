"""make browse: if this fails, looking at the history harms it, shows it to strangers, or errs.

What needs Datasette (the extra `browse`) or chromium is skipped where it is not installed.
"""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlencode
from urllib.request import urlopen

import pytest

from lib.ledger.comments import table_comments, view_comments
from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from lib.ledger.questions import Question, questions
from lib.pages import loopback
from lib.settings import DEFAULT_CONFIG
from schema.tables import Model
from scripts.embed import main as embed
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Place, Script

# One server answers most of the tests.
pytestmark = pytest.mark.xdist_group("browse")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
COMMENTS = table_comments() | view_comments()


@dataclass
class Server:
    """A browse.py that is running."""

    url: str
    end: Callable[[], tuple[int, str]]  # presses Ctrl-C; returns the exit status and stderr

    @property
    def port(self) -> int:
        return int(re.findall(r":(\d+)/", self.url)[0])

    def ask(
        self, path: str, *, method: str = "GET", hosts: tuple[str, ...] = ("127.0.0.1",)
    ) -> tuple[int, str]:
        """Return status and text of an answer to a request that names the hosts."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.putrequest(method, path, skip_host=True)
            for host in hosts:
                connection.putheader("Host", host)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def page(self, path: str) -> str:
        status, text = self.ask(path)
        assert status == 200, text
        return text


def address(out: IO[str] | None, err: IO[str] | None) -> str:
    """Return the address that a server prints before all else."""
    assert out is not None
    assert err is not None
    readable, _, _ = select.select([out], [], [], 60)
    assert readable, "it said nothing within a minute"
    line = out.readline()
    found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/runs) \(Ctrl-C ends\)\n", line)
    assert found, line or err.read()  # what has ended without a line says why
    return found[1]


def live_on() -> None:
    """Let the server live as long as the tests ask it."""
    signal.alarm(0)


@contextmanager
def browse(config: Path, prepare: processes.Work = live_on) -> Iterator[Server]:
    """Start browse.py in a fork; it is gone at the end, come what may."""
    flags = ["--config", config, "--port", "0"]
    with processes.start("browse", *flags, prepare=prepare) as process:

        def end() -> tuple[int, str]:
            process.send_signal(signal.SIGINT)
            answer = process.end()
            return answer.status, answer.err

        yield Server(address(process.out, process.err), end)


@contextmanager
def running(command: list[str | Path], **environment: str) -> Iterator[Server]:
    """Start a server by a command, in a process group of its own."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def end() -> tuple[int, str]:
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    try:
        yield Server(address(process.stdout, process.stderr), end)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A folder whose name has what addresses treat as special, with two runs in it."""
    path = tmp_path_factory.mktemp("browse") / "a #1? 100%41"
    path.mkdir()
    shutil.copy(DEFAULT_CONFIG, path / "config.ini")
    for layer in ("-1", "0"):
        flags = ["--config", path / "config.ini", "--esm-model", small_model]
        flags += ["--input", SOME_PROTEINS, "--repr-layers", layer]
        assert embed([str(flag) for flag in flags]) == 0
    with open_for_writing(str(path / "runs.sqlite")) as engine, transaction(engine) as session:
        session.add(Model(name=HOSTILE, sha256="f00"))
    return path


def copy_database(folder: Path, to: Path) -> None:
    """Copy a run database with what is still in its log."""
    with (
        closing(sqlite3.connect(folder / "runs.sqlite")) as old,
        closing(sqlite3.connect(to)) as new,
    ):
        old.backup(new)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with browse(folder / "config.ini") as started:
        yield started
        assert started.end() == (0, "")


# What the schema says


def test_every_column_of_every_table_and_view_has_a_comment(folder: Path) -> None:
    url = str(folder / "runs.sqlite")
    names = query(url, "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')").rows
    assert {name for (name,) in names} == COMMENTS.keys() | {"sqlite_sequence"}
    for name, comment in COMMENTS.items():
        assert comment.rows, name
        assert list(comment.columns) == query(url, f"SELECT * FROM {name}").columns
        assert all(comment.columns.values()), name


def test_the_comments_stand_in_the_database(folder: Path) -> None:
    for name, comment in COMMENTS.items():
        made = "SELECT sql FROM sqlite_schema WHERE name = ?"
        ((sql,),) = query(str(folder / "runs.sqlite"), made, [name]).rows
        assert all(text in sql for text in comment.columns.values())


def test_every_question_has_an_address_of_its_own() -> None:
    asked = questions()
    assert len({one.name for one in asked} | COMMENTS.keys()) == len(asked) + len(COMMENTS)
    assert asked[0].name == "which-runs-used-this-model-on-this-input"


# Pages


@pytest.mark.parametrize("question", questions(), ids=lambda one: one.name)
def test_a_question_has_a_page_with_its_answer(
    server: Server, folder: Path, question: Question
) -> None:
    page = server.page(f"/runs/{question.name}")
    assert f">{html.escape(question.text)}</h1>" in page
    address = f"/runs/{question.name}.json?_shape=array&{urlencode(question.fields)}"
    answer = json.loads(server.page(address))
    assert answer == query(str(folder / "runs.sqlite"), question.sql).dictionaries()
    fields = re.findall(r'<input type="text" id="qp\d+" name="(\w+)"', page)
    assert fields == list(question.fields)


def test_what_a_question_asks_about_is_said_in_fields(server: Server) -> None:
    def answer(name: str, **fields: str) -> list[dict[str, object]]:
        address = f"/runs/{name}.json?_shape=array&{urlencode(fields)}"
        rows: list[dict[str, object]] = json.loads(server.page(address))
        return rows

    used, made = "which-runs-used-this-model-on-this-input", "which-model-made-this-file"
    record, versions = "which-file-is-this-record-from", "which-library-versions-computed-this-run"
    assert [row["run"] for row in answer(used)] == [2, 1]  # an empty field leaves nothing out
    assert [row["run"] for row in answer(used, model="small", input="short_prot")] == [2, 1]
    assert answer(used, model="esm2_t33_650M_UR50D") == []
    assert answer(used, input="others.fasta") == []
    assert [row["run"] for row in answer(made)] == [1, 2]
    file = "run-000002/checkpoint-000001.parquet"
    assert [row["run"] for row in answer(made, file=file)] == [2]
    (row,) = answer(record, run="2", record="14")
    assert (row["run"], row["record_in_file"]) == (2, 14)
    assert answer(record, run="2", record="15") == []
    assert [row["run"] for row in answer(record)] == [1, 2]
    assert len(answer(versions)) == 2
    assert [row["attempt"] for row in answer(versions, run="2")] == [2]
    assert answer(versions, run="2' OR '1") == []


def test_the_fields_of_a_statement() -> None:
    template = (
        "SELECT {number: 7} FROM t WHERE a = {one: 1} AND b = '{two: x}'"
        " AND c LIKE '%{two: x}.fa' AND d = 'fixed'"
    )
    question = Question("Which one is it?", template)
    assert question.fields == {"number": "7", "one": "1", "two": "x"}
    assert question.sql == (
        "SELECT 7 FROM t WHERE a = 1 AND b = 'x' AND c LIKE '%x.fa' AND d = 'fixed'"
    )
    assert question.form_sql == (
        "SELECT CAST(:number AS INTEGER) FROM t WHERE (:one = '' OR a = :one)"
        " AND (:two = '' OR b = :two) AND c LIKE '%' || :two || '.fa' AND d = 'fixed'"
    )


@pytest.mark.parametrize("name", sorted(COMMENTS.keys() - {"schema_version"}))
def test_a_table_or_view_has_a_page_that_explains_its_columns(server: Server, name: str) -> None:
    page = html.unescape(server.page(f"/runs/{name}"))
    assert COMMENTS[name].rows in page
    for column, comment in COMMENTS[name].columns.items():
        assert f"<dt>{column}</dt><dd>{comment}</dd>" in page


def test_the_start_page_lists_the_questions_in_their_order(server: Server) -> None:
    page = server.page("/runs")
    names = [one.name for one in questions()]
    assert [name for name in re.findall(r'href="/runs/([\w-]+)"', page) if name in names] == names


# Read-only, and for this machine only


def test_no_request_changes_or_makes_a_file(place: Place, folder: Path) -> None:
    shutil.copytree(folder, place.folder / "copy")
    config = place.folder / "copy" / "config.ini"

    def files() -> dict[str, bytes]:
        # -shm is SQLite's map of readers and writers; -wal stays empty.
        whole = [p for p in config.parent.rglob("*") if p.is_file() and p.suffix != ".sqlite-shm"]
        return {p.name: p.read_bytes() for p in whole if p.stat().st_size}

    before = files()
    with browse(config) as server:
        for statement in (
            "delete from runs",
            "update models set name = 'x'",
            "with one as (select 1) insert into models (name) select 'x'",
            "with one as (select 1) delete from runs",
            "attach 'other.sqlite' as other",
            "vacuum into 'other.sqlite'",
            "select 1; delete from runs",
            "pragma journal_mode = delete",
            "select * from pragma_journal_mode('delete')",
            "select load_extension('x')",
            "select writefile('other.sqlite', 'x')",
        ):
            status, text = server.ask(f"/runs?sql={quote(statement)}")
            assert status == 400, (statement, text)
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert server.ask("/runs", method=method) == (405, "read-only\n")
        assert server.ask("/runs.db")[0] == 403
        status, err = server.end()
    assert status == 0
    assert "Traceback" not in err
    assert files() == before
    assert not list(ROOT.glob("other.sqlite*"))


@pytest.mark.parametrize(
    "hosts",
    [
        ("evil.example",),
        ("evil.example:8001",),
        ("127.0.0.1.evil.example",),
        ("localhost@evil.example",),
        ("127.0.0.1", "evil.example"),
        ("",),
        (),
    ],
)
def test_a_page_from_elsewhere_cannot_read_it(server: Server, hosts: tuple[str, ...]) -> None:
    # DNS rebinding: evil.example resolves to 127.0.0.1, and the browser believes it to be one site.
    status, text = server.ask("/runs.json", hosts=hosts)
    assert status in (400, 421)  # 400: not HTTP/1.1 at all
    assert "esm-ledger" not in text


@pytest.mark.parametrize("host", ["127.0.0.1:8001", "localhost", "LocalHost:9999"])
def test_this_machines_own_names_are_answered(server: Server, host: str) -> None:
    # A port forwarded by ssh comes with the port of the other end.
    assert server.ask("/runs", hosts=(host,))[0] == 200


def test_no_other_address_answers(server: Server) -> None:
    # Whoever listens on all addresses answers on this one, too.
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.port), timeout=5):
        pass


def test_plugins_that_happen_to_be_installed_do_not_take_part(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "uploads.py").write_text(
        "from datasette import Response, hookimpl\n"
        "def register_routes():\n"
        "    return [(r'^/upload$', lambda: Response.text('uploaded'))]\n"
        "register_routes = hookimpl(register_routes)\n"
    )
    about = tmp_path / "uploads-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: uploads\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[datasette]\nuploads = uploads\n")
    check = "import datasette.plugins as p; print(p.pm.get_plugin('uploads').__name__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "uploads\n"
    command: list[str | Path] = [sys.executable, ROOT / "scripts" / "browse.py", "--port", "0"]
    command += ["--config", folder / "config.ini"]
    with running(command, PYTHONPATH=str(tmp_path)) as server:
        assert server.ask("/upload")[0] == 404


# A live run


def test_a_live_writer_is_shown_and_never_in_the_way(place: Place, folder: Path) -> None:
    copy_database(folder, place.database)
    stop = threading.Event()
    with open_for_writing(str(place.database)) as engine, browse(place.config) as server:

        def look() -> None:
            while not stop.is_set():
                server.page("/runs/run_history")

        readers = [threading.Thread(target=look) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(20):
                with transaction(engine) as session:
                    session.add(Model(name=f"model {number}", sha256=str(number)))
                shown = server.page("/runs.json?sql=select+max(id)+from+models&_shape=arrayfirst")
                assert json.loads(shown) == [2 + 1 + number]
        finally:
            stop.set()
            for reader in readers:
                reader.join(30)
        # A reader that stays in the file would keep the log from being written back.
        with closing(sqlite3.connect(place.database, timeout=5)) as connection:
            assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        assert server.end() == (0, "")


def test_a_page_is_never_an_old_one(server: Server) -> None:
    with urlopen(server.url, timeout=30) as answer:
        assert answer.headers["Cache-Control"] == "no-cache"


def test_a_database_that_goes_away_is_told_and_comes_back(place: Place, folder: Path) -> None:
    copy_database(folder, place.database)
    away = place.folder / "away.sqlite"
    with browse(place.config) as server:
        assert server.ask("/runs")[0] == 200
        place.database.rename(away)
        status, text = server.ask("/runs")
        assert (status, "no such file" in text) == (500, True)
        place.database.write_bytes(b"something else" * 100)
        status, text = server.ask("/runs/runs")
        assert (status, "file is not a database" in text) == (500, True)
        away.rename(place.database)
        assert server.ask("/runs")[0] == 200
        assert server.end() == (0, "")


def test_a_damaged_table_is_told_on_its_page(place: Place, folder: Path) -> None:
    copy_database(folder, place.database)
    statement = (
        "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'runs'"
    )
    ((root, size),) = query(str(place.database), statement).rows
    with place.database.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    with browse(place.config) as server:
        for page in ("/runs/runs", "/runs/run_history", "/runs/runs.json"):
            status, text = server.ask(page)
            assert (status, "database disk image is malformed" in text) == (500, True)
        assert server.ask("/runs")[0] == 200
        assert server.ask("/runs/models")[0] == 200
        status, err = server.end()
    assert status == 0
    assert "Traceback" not in err


# The command


def answer_no_longer() -> None:
    """Do not wait for the last answers, which takes no more than some seconds."""
    assert 0 < loopback._LAST_ANSWERS_SECONDS <= 5
    loopback._LAST_ANSWERS_SECONDS = 0


def test_ctrl_c_ends_it_though_browsers_keep_connections_open(folder: Path) -> None:
    with browse(folder / "config.ini", answer_no_longer) as server, ExitStack() as connections:

        def connect(sent: bytes) -> socket.socket:
            one = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            connections.enter_context(one)
            one.sendall(sent)
            return one

        ending = b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert connect(b"GET /runs" + ending).recv(12) == b"HTTP/1.1 200"
        connect(b"GET /runs HTTP/1.1\r\nHo")
        # 20 MB that nobody takes: the answer is never whole.
        rows = b"select hex(zeroblob(100000)) from checkpoints, pragma_function_list limit 100"
        stuck = connect(b"GET /runs.csv?sql=" + rows.replace(b" ", b"+") + ending)
        assert stuck.recv(12) == b"HTTP/1.1 200"
        status, err = server.end()
    assert (status, err) == (0, "")


def test_a_port_that_is_taken(script: Script) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answer = script("browse", "--port", str(port))
    assert (answer.status, answer.error) == (4, f"127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_what_is_no_port(script: Script, port: str) -> None:
    answer = script("browse", "--port", port)
    assert (answer.status, answer.error) == (2, f"port {port}: not from 0 to 65535")


def test_no_database_or_another_programs(place: Place, script: Script) -> None:
    answer = script("browse", "--port", "0")
    assert (answer.status, answer.error) == (2, f"database {place.database}: no such file")
    with closing(sqlite3.connect(place.database)) as connection:
        connection.execute("CREATE TABLE t (x)")
    answer = script("browse", "--port", "0")
    assert answer.status == 2
    assert "application_id 0x0 is another program's" in answer.error


def test_datasette_that_is_not_installed(
    folder: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasette.app", None)
    monkeypatch.setitem(sys.modules, "datasette", None)
    answer = script("browse", "--config", folder / "config.ini", "--port", "0")
    assert answer.status == 2
    assert re.fullmatch(r"browse: datasette(\.app)? is not installed", answer.error)


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed-browse").exists(), reason="make browse would install"
)
def test_make_browse(folder: Path) -> None:
    inherited = dict.fromkeys(("MAKEFLAGS", "MFLAGS", "MAKELEVEL"), "")
    variables = {"CONFIG": str(folder / "config.ini"), "ARGS": "--port 0"}
    with running(["make", "--no-print-directory", "browse"], **inherited, **variables) as server:
        assert "Which model made this file?" in server.page("/runs")


# A real browser


def in_a_browser(url: str, profile: Path) -> str:
    """Return a page as chromium has it after its scripts have run; no other host can be reached."""
    assert CHROMIUM is not None
    words = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    words += "--disable-background-networking --disable-component-update --disable-sync "
    words += "--virtual-time-budget=3000 --timeout=20000 --dump-dom"
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    done = subprocess.run(
        [CHROMIUM, *words.split(), rules, f"--user-data-dir={profile}", url],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser(server: Server, folder: Path, tmp_path: Path) -> None:
    def page(path: str) -> str:
        dom = in_a_browser(f"{server.url}{path}", tmp_path / "profile")
        # Nothing comes from elsewhere, and no name from a file of strangers becomes an element.
        assert not re.findall(r'(?:src|rel="stylesheet"[^>]* href)="(?:https?:)?//', dom)
        assert "<title>taken" not in dom
        assert "<img" not in dom
        return dom

    start = page("")
    assert 'class="CodeMirror' in start  # the editor is made by scripts
    link = re.findall(r'href="/runs(/[\w-]+)"[^>]*>How much disk does each run take\?<', start)[0]
    answer = page(link)
    cells = re.findall(r'<td class="col-run_id">(\d+)</td>', answer)
    assert cells == ["1", "2"]
    edited = page("?sql=" + quote("select name from models where sha256 = 'f00'"))
    assert html.escape(HOSTILE, quote=False) in edited
    history = page("/run_history")
    assert "esm2_small (untrained)" in history
    assert "<dt>residues_per_second</dt><dd>residues computed per second" in history
    assert "dropdown-menu-icon" in history  # table.js has run


# How wide each page is in a frame of a telephone's width, as no window of chromium is as narrow.
MEASURE = """
onload = () => {
  const pages = [...document.querySelectorAll('iframe')].map(one => one.contentDocument);
  document.title = JSON.stringify(pages.map(page => [
    page.title, page.styleSheets.length, page.documentElement.clientWidth,
    page.documentElement.scrollWidth,
    [...page.querySelectorAll('td, pre, input[type=text], h1')].filter(
      one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflow != 'visible'
        || one.getBoundingClientRect().right > 390).map(one => one.textContent),
  ]));
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_nothing_sticks_out_on_a_telephone(server: Server, tmp_path: Path) -> None:
    names = ["", *(f"/{one.name}" for one in questions()), "/run_history", "/checkpoint_audit"]
    frames = ""
    for name in names:
        base = f'<head><base href="http://127.0.0.1:{server.port}/">'
        page = server.page(f"/runs{name}").replace("<head>", base, 1)
        frames += f'<iframe srcdoc="{html.escape(page)}" width="390" height="900"></iframe>'
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<!doctype html><style>iframe{{border:0}}</style>{frames}<script>{MEASURE}</script>"
    )
    dom = in_a_browser(frame.as_uri(), tmp_path / "profile")
    (title,) = re.findall(r"<title>(.*?)</title>", dom.partition("<iframe")[0])
    measured = json.loads(html.unescape(title))
    assert len(measured) == len(names)
    for name, (shown, sheets, width, scrolled, wider) in zip(names, measured, strict=True):
        assert shown
        assert sheets >= 2, name  # Datasette's and ours
        assert width <= 390
        assert (scrolled, wider) == (width, []), name
