"""Calls to several ranks at once: the first in the caller's thread, each other in a thread that is kept.

A push to several ranks ends when each of its calls has: bytes of a call that was given up may still be read from the
user's gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from pushstep.proto.errors import PushstepError

from ..transport.retry import answered
from ..transport.shield import shield
from ..transport.spans import Spans
from ..transport.step_call import Step
from ..transport.streams import Exchange

# How long rank 0 has for its verdict when another rank has refused a part.
VERDICT_S: Final = 2.0
_LOOK_S: Final = 0.1
_Task = Callable[[], None]


class Lanes:
    """Owns the threads. They are daemons: an unreachable rank must not delay the end of the program."""

    def __init__(self) -> None:
        self._queues: list[SimpleQueue[_Task | None]] = []

    def answers(
        self,
        calls: Sequence[Exchange | Step],
        spans: Spans,
        given_up: Callable[[], None] = lambda: None,
        *,
        are_equal: bool = False,
    ) -> list[Any]:
        """Wait for the answers of calls that have begun: for each its answer, or the exception instead of it.

        When one call fails, the others are cancelled, since they may wait for it. The first is rank 0's: when another rank
        has refused something, rank 0 still has VERDICT_S to say what that means, unless they `are_equal`. `given_up` is
        called when calls are cancelled, in any thread. What is not an Exception, such as a KeyboardInterrupt, is raised.
        """

        def cancel() -> None:
            given_up()
            for call in calls:
                call.cancel()

        def failed(place: int, error: BaseException) -> None:
            if place and isinstance(error, PushstepError) and not are_equal:
                timer = threading.Timer(VERDICT_S, cancel)
                timer.daemon = True
                timer.start()
            else:
                cancel()

        return self._run([spans.here(partial(answered, call.result)) for call in calls], cancel, failed)

    def _run(
        self,
        calls: Sequence[Callable[[], Any]],
        cancel: Callable[[], None],
        failed: Callable[[int, BaseException], None],
    ) -> list[Any]:
        outcomes: list[Any] = [None] * len(calls)
        left = threading.Semaphore(0)

        def make(place: int) -> None:
            try:
                outcomes[place] = calls[place]()
            except BaseException as error:  # noqa: BLE001 - given to the caller, who raises it
                outcomes[place] = error
                failed(place, error)
            left.release()

        for place in range(1, len(calls)):
            self._queue(place - 1).put(partial(make, place))
        make(0)
        shield.breaks(cancel)
        try:
            for _ in calls:
                while not left.acquire(timeout=_LOOK_S):
                    pass
        finally:
            shield.breaks(None)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def _queue(self, number: int) -> SimpleQueue[_Task | None]:
        while len(self._queues) <= number:
            queue: SimpleQueue[_Task | None] = SimpleQueue()
            self._queues.append(queue)
            threading.Thread(target=_work, args=(queue,), name="pushstep-rank", daemon=True).start()
        return self._queues[number]

    def close(self) -> None:
        """End the threads, each after the call that it is in."""
        queues, self._queues = self._queues, []
        for queue in queues:
            queue.put(None)


def _work(queue: SimpleQueue[_Task | None]) -> None:
    while (task := queue.get()) is not None:
        task()


def failure_of(outcomes: Sequence[Any]) -> Exception | None:
    """Why calls have failed: what a rank has refused, before what broke off, perhaps because of that. None: they have not."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    refused = [failure for failure in failures if isinstance(failure, PushstepError)]
    return next(iter([*refused, *failures]), None)
