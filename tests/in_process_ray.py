"""Ray in the process of the tests: actors are threads, so that every failure is cheap to try.

It has what lib/jobs uses of Ray, under the same names. tests/jobs/test_cluster.py uses Ray itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Hook = Callable[..., Any]
_LOADING = threading.Lock()


class ActorError(Exception):
    """An actor has died or cannot be reached."""


class Reference:
    """A result that is or will be there."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


class Handle:
    """An actor: a thread that runs its methods one after another, and one for those aside."""

    def __init__(self, ray: InProcessRay, made: type) -> None:
        self._ray, self.made = ray, made()
        self._pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: list[Future[Any]] = []
        self.killed = False
        self.has_loaded = False  # or has failed

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def call(self, name: str, arguments: tuple[Any, ...], returns: int, aside: bool) -> Any:  # noqa: ANN401
        """Begin a method; return a reference for each value that it returns."""
        futures: list[Future[Any]] = [Future() for _ in range(returns)]
        self._waiting += futures
        if self.killed:
            self._fail(futures)
        else:
            self._pools[aside].submit(self._run, name, arguments, futures)
        references = [Reference(one) for one in futures]
        return references if returns > 1 else references[0]

    def kill(self) -> None:
        self.killed = True
        self._fail(self._waiting)
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def end(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True)

    def _run(self, name: str, arguments: tuple[Any, ...], futures: list[Future[Any]]) -> None:
        try:
            if name == "compute":
                self._ray.wait_until_loaded()
            true = getattr(self.made, name)
            hook = self._ray.hooks.get(name)
            # What torch.load may load is said for a whole process, which actors do not share.
            with _LOADING if name == "load" else nullcontext():
                result = true(*arguments) if hook is None else hook(self, true, *arguments)
        except BaseException as error:
            self.has_loaded = True
            for one in futures:
                if not one.done():
                    one.set_exception(error)
            return
        for one, value in zip(futures, result if len(futures) > 1 else [result], strict=True):
            if not one.done():
                one.set_result(value)
        self.has_loaded |= name == "load"

    def _fail(self, futures: list[Future[Any]]) -> None:
        for one in futures:
            if not one.done():
                one.set_exception(ActorError("killed"))


class Method:
    """A method of an actor, as Ray calls it."""

    def __init__(self, handle: Handle, name: str, returns: int = 1, *, aside: bool = False) -> None:
        self._handle, self._name, self._returns, self._aside = handle, name, returns, aside

    def options(self, *, num_returns: int = 1, concurrency_group: str | None = None) -> Method:
        return Method(self._handle, self._name, num_returns, aside=concurrency_group is not None)

    def remote(self, *arguments: Any) -> Any:  # noqa: ANN401
        return self._handle.call(self._name, arguments, self._returns, self._aside)


class InProcessRay(ModuleType):
    """What `import ray` gives.

    machines: the resources of each. hooks: called in place of an actor's method of that name, with
    the handle, the method and its arguments.
    """

    __version__ = "in process"

    def __init__(self) -> None:
        super().__init__("ray")
        self.machines: list[dict[str, float]] = [{"CPU": 1.0}, {"CPU": 1.0}]
        self.hooks: dict[str, Hook] = {}
        self.actors: list[Handle] = []
        self.placed: list[str] = []  # the machine of each actor
        self.util = SimpleNamespace(
            scheduling_strategies=SimpleNamespace(
                NodeAffinitySchedulingStrategy=lambda node, soft: node
            )
        )

    def init(self, *_: object, **__: object) -> None:
        pass

    def wait_until_loaded(self) -> None:
        """Wait for all actors: on a busy machine one that loads late would miss a short run."""
        ends = time.monotonic() + 60
        while not all(one.has_loaded or one.killed for one in self.actors):
            assert time.monotonic() < ends, "an actor has not loaded within a minute"
            time.sleep(0.002)

    def shutdown(self) -> None:
        for one in self.actors:
            one.kill()
            one.end()

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": str(number), "Resources": one}
            for number, one in enumerate(self.machines)
        ]

    def get_runtime_context(self) -> Any:  # noqa: ANN401
        return SimpleNamespace(get_node_id=lambda: "here")

    def put(self, value: object) -> object:
        return value

    def kill(self, actor: Handle, *, no_restart: bool) -> None:
        assert no_restart
        actor.kill()

    def remote(self, **options: object) -> Callable[[type], Any]:
        assert options["max_restarts"] == options["max_task_retries"] == 0

        def make(made: type) -> Any:  # noqa: ANN401
            def start() -> Handle:
                self.placed.append(str(options["scheduling_strategy"]))
                self.actors.append(Handle(self, made))
                return self.actors[-1]

            return SimpleNamespace(remote=start)

        return make


def installed(monkeypatch: pytest.MonkeyPatch) -> InProcessRay:
    """Have `import ray` give this, whatever the environment says of Ray, and wait little for it."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_TOKEN", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "0")
    for module in ("crew", "dispatch"):
        monkeypatch.setattr(f"lib.jobs.{module}._BETWEEN_LOOKS", 0.02)
    ray = InProcessRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray
