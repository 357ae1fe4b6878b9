"""A process that holds workers and has them act when told.

Every side of a comparison runs its workers in such processes, so that none shares an interpreter with another or
with the conductor. A driver starts once, is set up for its peer (an RPC agent, a process group), and then takes any
number of crews: lists of workers made for one comparison. It ends with its pipe, so that none outlives the conductor.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

END_S = 15.0
# Importing torch takes a process 2 s, and its first optimizer as much again, in which it imports _dynamo; a fork none.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.rpc", "pushstep.client"]
Span = tuple[float, float]  # begin and end, on the clock that all processes share


class Worker(Protocol):
    """Has a method without arguments for each task that it can do: exchange, push, pull."""

    def close(self) -> None:
        """Give back what it holds."""


Make = Callable[..., Sequence[Worker]]
End = Callable[[], None]
SetUp = Callable[..., End]


class DriverEnded(RuntimeError):
    """The process is gone."""


class Driver:
    """Owns one process. Requests come in pairs, `begin` and `answer`, so that several drivers can work at once."""

    def __init__(self, set_up: SetUp | None = None, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, set_up, arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process."""
        return int(self._process.pid or 0)

    def begin(self, request: str, *arguments: Any) -> None:
        """Send a request."""
        try:
            self._pipe.send((request, arguments))
        except OSError:
            raise DriverEnded(f"driver {self.pid} ended with {self._process.exitcode}") from None

    def answer(self) -> Any:
        """Wait for what came of the oldest unanswered request (the first is the set-up)."""
        try:
            failed, value = self._pipe.recv()
        except (EOFError, OSError):
            raise DriverEnded(f"driver {self.pid} ended with {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(value)
        return value

    def end(self) -> None:
        """Ask the process to end; `wait` waits for it."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)

    def wait(self) -> None:
        """Wait for the process to end, and end it if it does not."""
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def end_all(drivers: Sequence[Driver]) -> None:
    """End drivers that may have to meet to do so."""
    for driver in drivers:
        driver.end()
    for driver in drivers:
        driver.wait()


class _Crews:
    """What a driver can be asked for."""

    def __init__(self) -> None:
        self._crews: dict[int, Sequence[Worker]] = {}

    def open(self, number: int, make: Make, arguments: Sequence[Any]) -> None:
        self._crews[number] = make(*arguments)

    def shut(self, number: int) -> None:
        for worker in self._crews.pop(number, ()):
            worker.close()

    def turn(
        self, number: int, task: str, warm: int, repeats: int, seconds: float, start_s: float
    ) -> list[list[Span]]:
        """What each worker's repeats took: `repeats` of them, and more until `seconds` from `start_s` are over."""
        workers = self._crews[number]
        spans: list[list[Span]] = [[] for _ in workers]
        faults: list[BaseException] = []

        def run(index: int) -> None:
            act = getattr(workers[index], task)
            try:
                for _ in range(warm):
                    act()
                time.sleep(max(0.0, start_s - time.perf_counter()))
                until_s = start_s + seconds
                while len(spans[index]) < repeats or time.perf_counter() < until_s:
                    begin = time.perf_counter()
                    act()
                    spans[index].append((begin, time.perf_counter()))
            except BaseException as fault:  # noqa: BLE001 - a thread's fault is the turn's
                faults.append(fault)

        if len(workers) == 1:
            run(0)
        else:
            threads = [threading.Thread(target=run, args=(index,)) for index in range(len(workers))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if faults:
            raise faults[0]
        return spans

    def shut_all(self) -> None:
        for number in list(self._crews):
            self.shut(number)


def _serve(pipe: Connection, set_up: SetUp | None, arguments: Sequence[Any]) -> None:
    crews = _Crews()
    end: list[End] = []

    def prepare() -> None:
        if set_up is not None:
            end.append(set_up(*arguments))

    pipe.send(_outcome(prepare))
    while (request := _next(pipe)) is not None:
        name, values = request
        pipe.send(_outcome(lambda name=name, values=values: getattr(crews, name)(*values)))
    crews.shut_all()
    for task in end:
        task()


def _next(pipe: Connection) -> Any:
    """The next request; None at the end, also when the conductor has died."""
    try:
        return pipe.recv()
    except (EOFError, KeyboardInterrupt):
        return None


def _outcome(task: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return False, task()
    except Exception:  # noqa: BLE001 - it is raised in the conductor
        return True, traceback.format_exc()
