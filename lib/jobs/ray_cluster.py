"""Ray clusters: joined or started on this machine, never without a token.

Ray's ports listen on every interface of a machine, and whoever reaches them can run programs
there. So a cluster that does not ask for a token is refused, and one started here asks for it.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lib.errors import InterruptedRunError, LedgerError, MachineError, SettingsError
from lib.jobs.interruption import Interruption
from schema.settings import ClusterSettings

__all__ = ["import_ray", "joined", "machines", "one_line", "ray_errors", "room"]

# A cluster on one machine shares its folder, so that only sequences go through the object store.
_OBJECT_STORE_BYTES = 1 << 30
_CONNECT_SECONDS = 10
_PROBE_SECONDS = 60
# What the probe below exits with.
_REFUSED, _OPEN = 8, 9
# Asks a cluster with this machine's token, which has to do, and with one that it makes up, which
# must not.
_PROBE = f"""
import os, secrets, sys
from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(sys.argv[1]).check_alive([], 20.0)
except AuthenticationError:
    sys.exit({_REFUSED})
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
AuthenticationTokenLoader.instance().reset_cache()
try:
    GcsClient(sys.argv[1]).check_alive([], 20.0)
except AuthenticationError:
    sys.exit(0)
sys.exit({_OPEN})
"""


def import_ray() -> ModuleType:
    """Return Ray's module; raises SettingsError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise SettingsError(f"[cluster] ray: {error.name} is not installed") from None
    module: ModuleType = ray
    return module


@contextmanager
def joined(cluster: ClusterSettings, interruption: Interruption) -> Iterator[str]:
    """Be connected to the cluster that the settings name; yield a few words about it.

    Raises SettingsError if Ray is not installed, MachineError if the cluster cannot be reached,
    refuses this machine's token or asks for none.
    """
    address = os.environ.get("RAY_ADDRESS") if cluster.ray == "auto" else cluster.ray
    if address and not re.fullmatch(r"[^\s:/]+:\d+", address):
        raise SettingsError(f"RAY_ADDRESS = {address}: not HOST:PORT")
    _set_environment(joining=bool(address))
    ray = import_ray()
    if address:
        _probe(address)
    try:
        _init(ray, address)
    except MachineError:
        if interruption.requested is not None:  # whose exception Ray's own code has swallowed
            raise interruption.error("interrupted") from None
        raise
    finally:
        # Ray has put a handler of its own in the place of ours.
        interruption.handle_again()
    try:
        if interruption.requested is not None:  # by a signal that Ray's own code received
            raise interruption.error("interrupted")
        yield f"Ray {ray.__version__} at {address}" if address else f"Ray {ray.__version__}"
    finally:
        ray.shutdown()


def room(device: str, threads: int) -> dict[str, int]:
    """Return how many workers each machine of the cluster has room for, in use or not, by its id.

    device: cuda for workers with a GPU each, cpu for workers with `threads` CPUs each.
    """
    if device == "cuda":
        return {node: int(has.get("GPU", 0)) for node, has in machines().items()}
    return {node: math.floor(has.get("CPU", 0) / threads) for node, has in machines().items()}


def machines() -> dict[str, Mapping[str, float]]:
    """Return what each machine of the cluster has by its id: CPU, GPU and more, in use or not."""
    with ray_errors():
        nodes = import_ray().nodes()
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def one_line(error: BaseException) -> str:
    """Return an error of Ray's as one line; of a method's exception, the exception itself."""
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, BaseException) else error
    # Where it happened is a list of numbers, and after the reason comes advice.
    text = re.sub(r"\x1b\[\d*m|, *\x1b\[\d*mray::.*| Some common causes.*", "", str(error))
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    # Between the first and the last line are addresses and a traceback.
    ends = " … ".join([lines[0][:200], lines[-1][:300]] if len(lines) > 1 else lines)
    return ": ".join(filter(None, [type(error).__name__, ends]))


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn what Ray raises, which may be anything, into a MachineError."""
    try:
        yield
    except LedgerError:
        raise
    except Exception as error:
        raise MachineError(f"Ray: {one_line(error)}") from None


def _set_environment(*, joining: bool) -> None:
    """Have Ray ask for a token and report nothing to its makers; to be done before its import."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray reads these once. Without them it prints advice, and hides GPUs from what asks for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not joining:  # the workers that it starts are as urgent as a run without Ray
        os.environ.setdefault("RAY_worker_niceness", "0")
    if _has_token():
        return
    if joining:
        raise MachineError(
            "no token of the cluster: RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are not set, and "
            f"{_token_file()} is not there"
        )
    # Known to this process and to those that it starts.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return _token_file().exists()


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _probe(address: str) -> None:
    """Raise MachineError unless a cluster is there that takes this machine's token and no other."""
    place = f"Ray cluster {address}"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # Ray would try for a minute
        raise MachineError(f"{place}: {error}") from None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"{place}: no answer in {_PROBE_SECONDS} s") from None
    if done.returncode == _REFUSED:
        raise MachineError(f"{place}: refuses the token of this machine")
    if done.returncode == _OPEN:
        raise MachineError(f"{place}: asks for no token (RAY_AUTH_MODE=token)")
    if done.returncode:
        fact = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise MachineError(f"{place}: {fact[:300]}")


def _init(ray: ModuleType, address: str | None) -> None:
    place = f"Ray cluster {address}" if address else "Ray on this machine"
    local = {} if address else {"object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(
            address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
            **local,
        )
        _silence(ray)
    except SystemExit:  # Ray's handler of SIGTERM
        raise InterruptedRunError("SIGTERM: interrupted", signal.SIGTERM) from None
    except Exception as error:  # Ray raises a dozen kinds, RuntimeError and ValueError among them
        raise MachineError(f"{place}: {one_line(error)}") from None


def _silence(ray: ModuleType) -> None:
    """Keep Ray from writing to stdout, where results go: it prints what its raylets report."""
    module: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(module, "print_to_stdstream"):
        module.print_to_stdstream = lambda *_, **__: None
