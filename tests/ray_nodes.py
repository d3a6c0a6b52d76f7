"""Ray nodes: a cluster on this machine, whose nodes tests add, and remove as a power cut does.

It runs in a process of its own, since Ray reads its environment once, at its import:
`python -m tests.ray_nodes FOLDER` obeys the lines of stdin (`add NAME=VALUE ...`, `remove NUMBER`)
and answers each with a line; the cluster ends with its input.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.processes import ROOT

NODE_BYTES = 100 << 20  # Ray refuses a smaller object store
# How often the head asks whether a node lives. Until it knows that one is dead, a worker that is
# started there can hold up those that are started elsewhere, for 10 s at Ray's own pace.
LOOKS = {"RAY_health_check_initial_delay_ms": "200", "RAY_health_check_period_ms": "300"}
# Workers of Ray give way to all other processes: beside busy ones one would take minutes to start.
AS_OTHERS = {"RAY_worker_niceness": "0"}


class Nodes:
    """The cluster as tests see it: a head that computes nothing, and nodes with a CPU each."""

    def __init__(self, folder: Path) -> None:
        """Start the head; `folder` needs a short name, for Ray's sockets."""
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_nodes", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, **LOOKS, **AS_OTHERS, **self.environment},
        )
        self.address = self._answer()

    def add(self, **environment: str) -> str:
        """Add a node, whose processes find more in their environment; return its number."""
        return self._ask("add", *(f"{name}={value}" for name, value in environment.items()))

    def remove(self, number: str) -> None:
        """Remove a node without grace."""
        self._ask("remove", number)

    def end(self) -> None:
        """End all of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _ask(self, *words: str) -> str:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster has ended"
        return line


@contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    """Start a cluster without nodes, and end it with the block."""
    made = Nodes(folder)
    try:
        yield made
    finally:
        made.end()


@contextmanager
def control_server(folder: Path, **environment: str) -> Iterator[str]:
    """Start what a driver speaks to first, the server of a head, and no more; yield its address."""
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    program = Path(ray.origin).with_name("core") / "src" / "ray" / "gcs" / "gcs_server"
    here = "127.0.0.1"
    flags = ["--gcs_server_port=0", f"--node-ip-address={here}", f"--session-dir={folder}"]
    with subprocess.Popen(
        [program, *flags, f"--log_dir={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    ) as server:
        try:
            port, ends = "", time.monotonic() + 60
            while not port:  # it writes it once it listens, first to a file that ends in .tmp
                assert server.poll() is None
                assert time.monotonic() < ends, "no file of that name tells the port"
                time.sleep(0.01)
                files = folder.glob("gcs_server_port_*[0-9a-f]")
                port = "".join(one.read_text() for one in files)
            yield f"{here}:{port}"
        finally:
            server.kill()


def main() -> None:
    """Obey."""
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,  # it would start and end nodes as they are needed
            "object_store_memory": NODE_BYTES,
            "temp_dir": sys.argv[1],
        },
    )
    print(cluster.address, flush=True)
    added: dict[str, Any] = {}
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "add":
            number = str(len(added))
            environment = dict(one.split("=", 1) for one in rest)
            added[number] = cluster.add_node(
                num_cpus=1, object_store_memory=NODE_BYTES, env_vars=environment
            )
        else:
            (number,) = rest
            cluster.remove_node(added.pop(number), allow_graceful=False)
        print(number, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
