"""The thread that keeps a worker's lease while the worker computes, and gives it up for a session that was dropped.

It beats three times a lease. The thread
knows the membership and not the session, so that a session which nobody holds any more ends, as a closed one does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError

from .at_exit import close_at_exit
from .membership import Member
from .retry import TransportFailure, answered
from .transport import Transport


class Heartbeat:
    """Beats for `member`, whoever that is at the time, from `start` to `stop`."""

    def __init__(self, transport: Transport, model: str) -> None:
        self.member: Member | None = None
        self._transport = transport
        self._model = model
        # a queue that may be put to while this very thread takes from it: a collection can come at any moment
        self._stopped: SimpleQueue[None] = SimpleQueue()
        self._last_words: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if it has not begun yet."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(self._stopped,), name="pushstep-heartbeat", daemon=True
            )
            self._thread.start()
            close_at_exit(self)

    def stop(self) -> None:
        """Have no further beat begin."""
        self._stopped.put(None)

    def rest(self) -> None:
        """Beat for nobody, until the next `start`: there is no membership any more."""
        self.member, self._thread = None, None
        stopped, self._stopped = self._stopped, SimpleQueue()
        stopped.put(None)

    def wait(self, timeout_s: float) -> None:
        """Wait for the beat that is under way, if one is."""
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)

    def close_within(self, seconds: float) -> None:
        """The process ends, which this thread must not outlast."""
        self.stop()
        self.wait(seconds)

    def abandon(self, then: Callable[[], None]) -> None:
        """The session was dropped: leave, call `then` and close the connection, all in the thread.

        Called by a collection, at any moment of any thread. Who never joined has nothing to leave.
        """
        self._last_words = then
        self.stop()

    def leave(self) -> None:
        """Leave the model. PushstepError or TransportFailure if that is not answered."""
        if self.member is not None:
            request = pb.LeaveRequest(model=self._model, identity=self.member.identity())
            answered(partial(self._transport.leave, request))

    def _run(self, stopped: SimpleQueue[None]) -> None:
        while self.member is not None and not _is_put_within(stopped, self.member.lease_s / 3):
            request = pb.HeartbeatRequest(model=self._model, identity=self.member.identity())
            # a failure says nothing: the next step finds out, and tells the user
            with suppress(PushstepError, TransportFailure):
                answered(partial(self._transport.heartbeat, request))
        if self._last_words is not None and stopped is self._stopped:
            self._last_words()
            with suppress(PushstepError, TransportFailure):  # the lease ends by itself
                self.leave()
            self._transport.close()


def _is_put_within(queue: SimpleQueue[None], seconds: float) -> bool:
    try:
        queue.get(timeout=seconds)
    except Empty:
        return False
    return True
