"""The heartbeat: a thread that keeps a worker's lease while the worker computes.

It beats three times per lease. The thread refers to the membership and not to the session, so that a session without
`close()` can be collected; the thread then leaves the model for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError

from ..transport.channel import Transport
from ..transport.retry import TransportFailure, answered
from .at_exit import close_at_exit
from .member import Member


class Heartbeat:
    """Sends heartbeats for the current `member`, from `start` to `stop`."""

    def __init__(self, transport: Transport, model: str) -> None:
        self.member: Member | None = None
        self._transport = transport
        self._model = model
        # reentrant: a garbage collection may call `abandon`, and so put(), while this thread is in get()
        self._stopped: SimpleQueue[None] = SimpleQueue()
        self._last_words: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it was started."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(self._stopped,), name="pushstep-heartbeat", daemon=True
            )
            self._thread.start()
            close_at_exit(self)

    def stop(self) -> None:
        """Let no further beat begin."""
        self._stopped.put(None)

    def rest(self) -> None:
        """Drop the membership and beat for nobody until the next `start`."""
        self.member, self._thread = None, None
        stopped, self._stopped = self._stopped, SimpleQueue()
        stopped.put(None)

    def wait(self, timeout_s: float) -> None:
        """Wait until a beat under way has ended and the thread with it, at most `timeout_s`."""
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)

    def close_within(self, seconds: float) -> None:
        """End the thread before the process ends; wait at most that long for it."""
        self.stop()
        self.wait(seconds)

    def abandon(self, then: Callable[[], None]) -> None:
        """End a session that was dropped: call `then`, leave and close the connection, all in the thread.

        A garbage collection calls this, at any moment and in any thread. Without a membership nothing is done.
        """
        self._last_words = then
        self.stop()

    def leave(self) -> None:
        """Leave the model. PushstepError if the server refuses, TransportFailure if it does not answer."""
        if self.member is not None:
            request = pb.LeaveRequest(model=self._model, identity=self.member.identity())
            answered(partial(self._transport.leave, request))

    def _run(self, stopped: SimpleQueue[None]) -> None:
        while self.member is not None and not _is_put_within(stopped, self.member.lease_s / 3):
            request = pb.HeartbeatRequest(model=self._model, identity=self.member.identity())
            # a failure is ignored: the next step meets it too, and tells the user
            with suppress(PushstepError, TransportFailure):
                answered(partial(self._transport.heartbeat, request))
        if self._last_words is not None and stopped is self._stopped:
            self._last_words()
            with suppress(PushstepError, TransportFailure):  # without this the lease ends by itself
                self.leave()
            self._transport.close()


def _is_put_within(queue: SimpleQueue[None], seconds: float) -> bool:
    try:
        queue.get(timeout=seconds)
    except Empty:
        return False
    return True
