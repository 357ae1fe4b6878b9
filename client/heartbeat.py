"""The thread that keeps a worker's lease while the worker computes.

It beats three times a lease. A beat that fails says nothing: the next step finds out, and tells the user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError

from .membership import Member
from .retry import TransportFailure, answered
from .transport import Transport


class Heartbeat:
    """Beats for whoever `member()` is at the time, from `start` to `stop`."""

    def __init__(self, transport: Transport, model: str, member: Callable[[], Member | None]) -> None:
        self._transport = transport
        self._model = model
        self._member = member
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if it has not begun yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="pushstep-heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Have no further beat begin."""
        self._stop.set()

    def wait(self, timeout_s: float) -> None:
        """Wait for the beat that is under way, if one is."""
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)

    def _beat(self) -> None:
        member = self._member()
        while member is not None and not self._stop.wait(member.lease_s / 3):
            member = self._member()
            if member is None:
                return
            try:
                request = pb.HeartbeatRequest(model=self._model, identity=member.identity())
                answered(partial(self._transport.heartbeat, request))
            except (PushstepError, TransportFailure):
                continue  # the next step finds out, and says so to the user
