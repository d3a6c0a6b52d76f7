"""Control groups: if this fails, a job's container is killed, or a pack is halved for nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from lib.network import cgroups
from lib.network.cgroups import memory_left
from lib.network.memory import available_bytes
from tests.processes import run_function

# Lines before and after the groups', as mountinfo has them.
MOUNTINFO = """\
22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw
{}27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
"""
V1 = "35 31 0:32 {} {} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
CPU = "36 31 0:33 {} {} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "37 31 0:34 {} {} rw,nosuid shared:4 master:2 - cgroup2 cgroup2 rw,nsdelegate\n"


class Machine:
    """A machine of files: what /proc tells about the process, and its trees of groups."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._mounts = ""
        self._proc = folder / "proc"
        self._proc.mkdir()
        self.is_in("")
        self.mount()
        monkeypatch.setattr(cgroups, "_PROC", self._proc)

    def is_in(self, *lines: str) -> None:
        """Put the process into groups: lines of /proc/self/cgroup."""
        (self._proc / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, line: str = "", root: str = "/", name: str = "cgroup") -> Path:
        """Mount the group `root` of a tree; return the folder it is mounted at."""
        point = self.folder / name
        point.mkdir(exist_ok=True)
        self._mounts += line.format(root, str(point).replace(" ", r"\040"))
        (self._proc / "mountinfo").write_text(MOUNTINFO.format(self._mounts))
        return point


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def v2(folder: Path, limit: int | str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 7\nfile 900\nactive_file 500\ninactive_file {inactive}\n"
    )


def v1(folder: Path, limit: int, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"cache 900\ninactive_file 3\nactive_file 4\ntotal_cache 950\n"
        f"total_inactive_file {inactive}\ntotal_active_file 600\n"
    )


def test_version_2_is_read_where_the_process_is(machine: Machine) -> None:
    machine.is_in("0::/job.slice/job-1.scope")
    root = machine.mount(V2)
    v2(root / "job.slice/job-1.scope", 3000, 1000)
    v2(root / "job.slice/job-2.scope", 300, 100)
    assert memory_left() == 2000


def test_version_1_is_read_where_the_process_is(machine: Machine) -> None:
    machine.is_in("5:cpu,cpuacct:/elsewhere", "4:memory:/job/1", "1:name=systemd:/elsewhere")
    machine.mount(CPU, name="cpu")
    root = machine.mount(V1)
    v1(root, 1 << 63, 5000)
    v1(root / "job/1", 3000, 1000)
    v1(root / "elsewhere", 300, 100)
    assert memory_left() == 2000


def test_controllers_of_version_1_can_share_a_tree(machine: Machine) -> None:
    machine.is_in("4:cpu,memory:/job")
    root = machine.mount(V1.replace("rw,memory", "rw,cpu,memory"))
    v1(root / "job", 3000, 1000)
    assert memory_left() == 2000


@pytest.mark.parametrize("controller_of", [1, 2])
def test_in_a_hybrid_the_tree_with_the_memory_controller_counts(
    machine: Machine, controller_of: int
) -> None:
    machine.is_in("4:memory:/job" if controller_of == 1 else "4:pids:/job", "0::/job")
    old = machine.mount(V1 if controller_of == 1 else CPU, name="memory")
    new = machine.mount(V2, name="unified")
    (new / "job").mkdir()
    if controller_of == 1:
        v1(old / "job", 3000, 1000)
    else:
        v2(new / "job", 3000, 1000)
    assert memory_left() == 2000


@pytest.mark.parametrize("smallest", ["a", "a/b", "a/b/c"])
def test_the_smallest_remainder_of_all_groups_above_wins(machine: Machine, smallest: str) -> None:
    machine.is_in("0::/a/b/c")
    root = machine.mount(V2)
    for name in ("a", "a/b", "a/b/c"):
        v2(root / name, 900 if name == smallest else 9000, 400)
    assert memory_left() == 500


def test_what_counts_is_what_is_left_and_not_the_limit(machine: Machine) -> None:
    machine.is_in("0::/a/b")
    root = machine.mount(V2)
    v2(root / "a", 9000, 8900)  # others in it use most
    v2(root / "a/b", 1000, 100)
    assert memory_left() == 100


def test_inactive_page_cache_is_left(machine: Machine) -> None:
    machine.is_in("4:memory:/a", "0::/b")
    old, new = machine.mount(V1, name="memory"), machine.mount(V2, name="unified")
    v1(old / "a", 5000, 4500, inactive=3000)
    assert memory_left() == 3500
    v2(new / "b", 5000, 4000, inactive=700)
    assert memory_left() == 1700
    (new / "b/memory.stat").unlink()
    assert memory_left() == 1000


def test_page_cache_in_use_is_left_at_most(machine: Machine) -> None:
    machine.is_in("4:memory:/a", "0::/b")
    old, new = machine.mount(V1, name="memory"), machine.mount(V2, name="unified")
    v1(old / "a", 5000, 4500, inactive=300)
    assert (memory_left(), memory_left(at_most=True)) == (800, 1100)
    v2(new / "b", 5000, 4900, inactive=70)
    assert (memory_left(), memory_left(at_most=True)) == (170, 420)
    assert available_bytes(torch.device("cpu")) == 170
    assert available_bytes(torch.device("cpu"), at_most=True) == 420


def test_a_group_beyond_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.is_in("0::/a")
    v2(machine.mount(V2) / "a", 1000, 1200, inactive=100)
    assert memory_left() == 0


def test_no_limit_is_no_number(machine: Machine) -> None:
    machine.is_in("4:memory:/a", "0::/b")
    v1(machine.mount(V1, name="memory") / "a", 9_223_372_036_854_771_712, 1000)
    v2(machine.mount(V2, name="unified") / "b", "max", 1000)
    assert memory_left() is None
    left = available_bytes(torch.device("cpu"))
    assert left is not None
    assert 1e8 < left < 1e14


def test_the_least_of_machine_and_groups_is_available(machine: Machine) -> None:
    machine.is_in("0::/a")
    root = machine.mount(V2)
    v2(root / "a", 3000, 1000)
    assert available_bytes(torch.device("cpu")) == 2000
    v2(root / "a", 1 << 60, 1000)
    left = available_bytes(torch.device("cpu"))
    assert left is not None
    assert left < 1e14


def test_a_container_sees_its_group_as_the_root_of_what_is_mounted(machine: Machine) -> None:
    # Docker without a namespace of groups: the mount's root is the group, and so is its path.
    machine.is_in("4:memory:/docker/0af1/inner")
    root = machine.mount(V1, root="/docker/0af1")
    v1(root, 3000, 1000)
    v1(root / "inner", 5000, 1000)
    v1(root / "docker/0af1/inner", 300, 100)
    assert memory_left() == 2000


def test_a_namespace_hides_the_groups_above_it(machine: Machine) -> None:
    machine.is_in("0::/")
    root = machine.mount(V2)
    v2(root, 3000, 1000)
    assert memory_left() == 2000


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/kubepods/pod1/outer", "/docker/0af1"),  # one container runtime within another
        ("/", "/.."),  # mounted before the process had its namespace
        ("/../elsewhere", "/"),  # moved out of its namespace
    ],
)
def test_a_group_that_cannot_be_found_is_taken_for_what_is_mounted(
    machine: Machine, group: str, root: str
) -> None:
    machine.is_in(f"0::{group}")
    point = machine.mount(V2, root=root)
    v2(point, 3000, 1000)
    v2(machine.folder / "elsewhere", 300, 100)
    assert memory_left() == 2000


def test_groups_of_others_that_are_mounted_too_do_not_count(machine: Machine) -> None:
    machine.is_in("0::/mine")
    v2(machine.mount(V2, name="whole") / "mine", 3000, 1000)
    v2(machine.mount(V2, root="/theirs", name="theirs"), 300, 100)
    v2(machine.mount(V2, root="/min", name="min"), 300, 100)
    assert memory_left() == 2000


def test_a_mount_may_have_blanks_in_its_path(machine: Machine) -> None:
    machine.is_in("0::/a job: one")
    v2(machine.mount(V2, name="all my groups") / "a job: one", 3000, 1000)
    assert memory_left() == 2000


@pytest.mark.parametrize("text", ["", "\n", "no group at all\n", "0::/gone\n7:memory:/gone\n"])
def test_what_cannot_be_read_limits_nothing(machine: Machine, text: str) -> None:
    machine.is_in(text)
    machine.mount(V2)
    machine.mount("39 31 0:35 / /sys - cgroup2\ngarbage\n", name="other")
    assert memory_left() is None


def test_a_system_without_proc_limits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "_PROC", tmp_path / "nowhere")
    assert memory_left() is None


# ---- A real limit

LIMIT = 2 << 30
CACHED = 64 << 20
# The kernel counts use and page cache at different times.
SLACK = 16 << 20


def measure(group: Path, file: Path, limited: Path, version: cgroups._Version) -> None:
    """Move this process into a group, fill memory and page cache there, and print what is left."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    kept = b"1" * CACHED
    with file.open("wb") as opened:
        opened.write(kept)
        os.fsync(opened.fileno())
    used = (limited / version.usage).read_text()
    fields = dict(line.split() for line in (limited / "memory.stat").read_text().splitlines())
    left = available_bytes(torch.device("cpu"))
    del kept
    print(left, used, fields[version.inactive_file])


@contextmanager
def group_below(parent: Path, name: str, limit: str) -> Iterator[Path]:
    """Make a group whose memory can be limited; raises OSError where that is not possible."""
    folder = parent / name
    folder.mkdir()
    try:
        if not (folder / limit).exists():
            raise OSError(f"{parent}: does not hand on the memory controller")
        yield folder
    finally:
        folder.rmdir()


def parents() -> Iterator[tuple[cgroups._Version, Path]]:
    """Yield where a group can be made that the limits of the tests' own group still hold for.

    In version 2 a group has either processes or groups with controllers below it, so that is one
    further up.
    """
    folders = cgroups._folders(cgroups._proc_text("cgroup"), cgroups._proc_text("mountinfo"))
    yield from [one for one in folders if one[0] is cgroups._V1][:1]
    yield from [one for one in folders if one[0] is cgroups._V2]


@contextmanager
def limited_group(above: bool) -> Iterator[tuple[cgroups._Version, Path, Path]]:
    """Yield a group for a process, and the group with the limit: itself, or the one above it."""
    name = f"esm-ledger-test-{os.getpid()}"
    reason: object = "none is mounted"
    for version, parent in parents():
        with ExitStack() as stack:
            try:
                limited = stack.enter_context(group_below(parent, name, version.limit))
                if above and version is cgroups._V2:
                    (limited / "cgroup.subtree_control").write_text("+memory")
                below = group_below(limited, "inner", version.limit)
                group = stack.enter_context(below) if above else limited
                (limited / version.limit).write_text(str(LIMIT))
            except OSError as error:
                reason = error
                continue
            yield version, group, limited
            return
    pytest.skip(f"needs the right to make a control group with a memory limit: {reason}")


@pytest.mark.parametrize("above", [False, True], ids=["own limit", "limit above"])
def test_a_real_limit_is_what_is_available(tmp_path: Path, above: bool) -> None:
    with limited_group(above) as (version, group, limited):
        # Only what the process takes from here on counts in the new group.
        done = run_function(partial(measure, group, tmp_path / "file", limited, version))
        assert done.status == 0, done.err
        available, used, inactive = map(int, done.out.split())
    assert CACHED < used < LIMIT
    assert abs(available - (LIMIT - used + inactive)) < SLACK
    assert available < LIMIT
