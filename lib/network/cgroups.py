"""Control groups: how much memory Linux still lets this process use.

A limit holds for a group and all groups below it, so each group from the process's own up to the
one that is mounted counts, and the smallest remainder wins. Versions 1 and 2 of control groups can
both be mounted; the memory controller belongs to one of them. Documentation: cgroups(7), and
admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

__all__ = ["memory_left"]

_PROC = Path("/proc/self")
# number:controllers:path
_GROUP = re.compile(r"^(\d+):([^:\n]*):(/.*)$", re.MULTILINE)
# id parent device root point options fields… - type source options
_MOUNT = re.compile(
    r"^[^ \n]+ [^ \n]+ [^ \n]+ ([^ \n]+) ([^ \n]+) .*- (cgroup2?) [^ \n]* ([^ \n]+)$", re.MULTILINE
)
# Version 1 reports that a group has no limit as the largest number of whole pages.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class _Version:
    """The names by which a version of control groups reports memory."""

    limit: str
    usage: str
    # Page cache in a group and all below it: what has not been used lately, and the rest.
    inactive_file: str
    active_file: str


# memory.high is not a limit here: it slows a process down, but never ends it.
_V2 = _Version("memory.max", "memory.current", "inactive_file", "active_file")
_V1 = _Version(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"
)


@dataclass(frozen=True)
class _Mount:
    """A mounted tree of groups: the folder `point` is the group `root`."""

    version: _Version
    root: PurePosixPath
    point: Path


def memory_left(*, at_most: bool = False) -> int | None:
    """Return the bytes that the process may still use, or None if no group limits it.

    at_most: counting half of the page cache that is in use, which the kernel frees before it ends
    a process; of a whole machine it counts at least as much itself (MemAvailable). Otherwise none
    of it counts, so that the code of this process has room, too.
    """
    try:
        folders = _folders(_proc_text("cgroup"), _proc_text("mountinfo"))
    except OSError:  # not Linux
        return None
    known = [left for one in folders if (left := _left(*one, at_most=at_most)) is not None]
    return min(known, default=None)


def _proc_text(name: str) -> str:
    return (_PROC / name).read_text(encoding="utf-8", errors="surrogateescape")


@lru_cache(maxsize=1)  # asked before each pack, and hardly ever with another text
def _folders(cgroup: str, mountinfo: str) -> list[tuple[_Version, Path]]:
    """Return the folders of all groups that can limit the memory of the process."""
    mounts = [*_mounts(mountinfo)]
    return [
        (version, folder)
        for version, group in _own_groups(cgroup).items()
        for folder in _upwards(group, [one for one in mounts if one.version is version])
    ]


def _own_groups(text: str) -> dict[_Version, PurePosixPath]:
    """Return the group of the process in each version, from /proc/PID/cgroup.

    Version 2 has number 0 and no controllers.
    """
    groups = {}
    for number, controllers, path in _GROUP.findall(text):
        if number == "0" and not controllers:
            groups[_V2] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            groups[_V1] = PurePosixPath(path)
    return groups


def _mounts(text: str) -> Iterator[_Mount]:
    """Yield the trees that can limit memory, from /proc/PID/mountinfo."""
    for root, point, kind, options in _MOUNT.findall(text):
        place = PurePosixPath(_unescaped(root)), Path(_unescaped(point))
        if kind == "cgroup2":
            yield _Mount(_V2, *place)
        elif "memory" in options.split(","):
            yield _Mount(_V1, *place)


def _unescaped(path: str) -> str:
    r"""Return a path of mountinfo, where a blank is `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _upwards(group: PurePosixPath, mounts: list[_Mount]) -> Iterator[Path]:
    """Yield the folder of a group and those of the groups above it, as far as they are mounted."""
    holding = [one for one in mounts if _is_below(group, one.root)]
    for mount in holding:
        below = group.relative_to(mount.root)
        yield from (mount.point / one for one in (below, *below.parents))
    if not holding and mounts:
        # A container can hide where its group is. What it has mounted is then its own group.
        yield mounts[0].point


def _is_below(group: PurePosixPath, root: PurePosixPath) -> bool:
    """Return whether a group's path leads down from a mount's root.

    `..` stands for what a namespace hides.
    """
    return group.is_relative_to(root) and ".." not in group.relative_to(root).parts


def _left(version: _Version, folder: Path, *, at_most: bool) -> int | None:
    """Return the bytes left in a group, or None if it has no limit or does not exist."""
    try:
        limit = int((folder / version.limit).read_text(encoding="ascii"))
        used = int((folder / version.usage).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no memory controller, or "max"
        return None
    if limit >= _NO_LIMIT:
        return None
    inactive, active = _page_cache(version, folder)
    return max(0, limit - used + inactive + (active // 2 if at_most else 0))


def _page_cache(version: _Version, folder: Path) -> tuple[int, int]:
    """Return the bytes of inactive and of active page cache, which count as used.

    At a limit the kernel first reclaims memory, and ends a process only if that does not suffice;
    it begins with inactive page cache. Reading a large file fills a group with it.
    """
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    sizes = dict(line.split(" ", 1) for line in lines)
    return int(sizes.get(version.inactive_file, 0)), int(sizes.get(version.active_file, 0))
