"""Processes: if these fail, tests of kills and signals try something else than a user's process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from tests import processes
from tests.conftest import Place
from tests.processes import run_function, start_function


def print_beginning() -> None:
    """Print what a process begins with."""
    tasks = len(list(Path("/proc/self/task").iterdir()))
    print(threading.active_count(), tasks, "torch" in sys.modules, len(sys.argv))


def print_surroundings() -> None:
    print(Path.cwd(), dict(os.environ), signal.getsignal(signal.SIGINT), sep="\n")


def write_to_both() -> None:
    print("ün", end="")
    print("zwei", file=sys.stderr)


def leave(status: object) -> None:
    sys.exit(status)  # type: ignore[arg-type]


def wait_for_ever() -> None:
    processes.pause(Path("/nowhere/gate"))


def fail() -> None:
    raise KeyError("lost")


def test_a_process_begins_with_one_thread_and_torch_imported() -> None:
    assert run_function(print_beginning, "one", "two").out == "1 1 True 3\n"


def test_output_and_status_are_told_apart() -> None:
    answer = run_function(write_to_both)
    assert (answer.status, answer.out, answer.err) == (0, "ün", "zwei\n")
    assert [run_function(partial(leave, status)).status for status in (None, 0, 3)] == [0, 0, 3]
    failed = run_function(fail)
    assert failed.status == 1
    assert failed.err.endswith("KeyError: 'lost'\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_nobody_handles_is_told_as_the_end(number: signal.Signals) -> None:
    with start_function(wait_for_ever) as process:
        process.wait_for("reached")
        process.send_signal(number)
        assert process.end().status == -number


def test_a_process_that_is_left_is_killed() -> None:
    with start_function(wait_for_ever) as process:
        process.wait_for("reached")
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def die_while_printing() -> None:
    tqdm.get_lock().acquire()
    processes.die()


def test_one_that_dies_while_it_prints_stops_no_other(place: Place) -> None:
    assert run_function(die_while_printing).status == -signal.SIGKILL
    assert place.run("history").error.endswith("no such file")


def test_what_is_waited_for_and_does_not_come_is_said_with_what_came() -> None:
    with (
        start_function(write_to_both) as process,
        pytest.raises(AssertionError, match="ended without 'reached': zwei"),
    ):
        process.wait_for("reached")


def test_folder_environment_and_handlers_are_as_on_the_command_line(place: Place) -> None:
    only = {"ONLY": "this"}
    with start_function(print_surroundings, folder=place.folder, environment=only) as process:
        folder, environment, handler = process.end().out.splitlines()
    assert folder == str(place.folder)
    assert environment == "{'ONLY': 'this'}"
    assert "default_int_handler" in handler


def test_a_script_is_the_main_module(place: Place) -> None:
    """The part of a script under `if __name__ == "__main__"` runs, here its exit status."""
    for answer in (place.run("history"), place.run_afresh("history")):
        assert (answer.status, answer.out) == (2, "")
        assert answer.error == f"database {place.database}: no such file"


def test_a_function_is_patched_before_or_after_its_nth_call() -> None:
    for after, expected in ((False, ["1", "here", "2", "3"]), (True, ["1", "2", "here", "3"])):
        assert run_function(partial(count_calls, after)).out.split() == expected


def count_calls(after: bool) -> None:
    target = "tests.test_processes.print_number"
    processes.at_call(target, 2, partial(print, "here"), after=after)
    module = sys.modules["tests.test_processes"]
    for number in (1, 2, 3):
        module.print_number(number)


def print_number(number: int) -> None:
    print(number)
