"""One request on its way: sent until it is answered; a push's body goes no oftener than it takes.

A push that waits for other workers is answered `push_pending` from time to time. If the server holds its body by then,
the next attempt goes without one and attaches to the push that waits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Generic, TypeVar

from pushstep.proto.errors import Broken, ModelFailed, NotHeld, PushPending
from pushstep.proto.training_pb2 import PushHeader

from .retry import TransportFailure, answered
from .transport import Body

T = TypeVar("T")
NOTHING: Final = Body((), ())


class Attempts(Generic[T]):
    """Call it for one attempt of `send`."""

    def __init__(self, send: Callable[[], T]) -> None:
        self._whole = send
        # whether an attempt may have been taken although it was not answered with what came of it
        self.in_doubt = False

    def _attempt(self) -> T:
        return self._whole()

    def __call__(self) -> T:
        """The answer, or the catalogue's error, or TransportFailure."""
        try:
            return answered(self._attempt)
        except ModelFailed:
            raise  # until a restore, which ends its doubt
        except (TransportFailure, Broken):
            self.in_doubt = True
            raise


class Sending(Attempts[T]):
    """A push's. `send` takes the header and a body; `begun` is a first attempt that is under way."""

    def __init__(
        self,
        send: Callable[[PushHeader, Body], T],
        header: PushHeader,
        body: Body,
        begun: Callable[[], T] | None = None,
    ) -> None:
        # not a method of its own: in a cycle it would hold the gradients, whose memory is to be lent again, until a collection
        super().__init__(partial(send, header, body))
        self._send = send
        self._header = header
        self._begun = begun

    def _attempt(self) -> T:
        begun, self._begun = self._begun, None
        if begun is not None:
            return begun()
        if self._header.held_digest:
            return self._send(self._header, NOTHING)
        return super()._attempt()

    def __call__(self) -> T:
        """The answer, or the catalogue's error, or TransportFailure."""
        header = self._header
        try:
            return super().__call__()
        except PushPending as error:
            header.held_digest = int(error.fields["digest"])
            self.in_doubt = True
            raise
        except NotHeld:
            header.held_digest = 0
            raise
