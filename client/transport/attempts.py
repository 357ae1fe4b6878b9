"""The attempts of one request, which `Retry` repeats until it is answered.

The server answers a push that waits for other workers with `push_pending` from time to time. The server then holds the
push's body, so the next attempt goes without a body and attaches to the pending push.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Generic, TypeVar

from pushstep.proto.errors import Broken, ModelFailed, NotHeld, PushPending
from pushstep.proto.training_pb2 import PushHeader

from .retry import TransportFailure, answered
from .streams import Body

T = TypeVar("T")
NOTHING: Final = Body((), ())


class Attempts(Generic[T]):
    """A call makes one attempt of `send`. `in_doubt`: an attempt without an answer may have been applied."""

    def __init__(self, send: Callable[[], T]) -> None:
        self._whole = send
        self.in_doubt = False

    def _attempt(self) -> T:
        return self._whole()

    def __call__(self) -> T:
        """Make one attempt: its answer. The catalogue's error, or TransportFailure if there was no answer."""
        try:
            return answered(self._attempt)
        except ModelFailed:
            raise  # no doubt: a failed model applies nothing until a restore, and the restore supersedes this request
        except (TransportFailure, Broken):
            self.in_doubt = True
            raise


class Sending(Attempts[T]):
    """The attempts of a push: `send` takes header and body, `begun` finishes a first attempt under way."""

    def __init__(
        self,
        send: Callable[[PushHeader, Body], T],
        header: PushHeader,
        body: Body,
        begun: Callable[[], T] | None = None,
    ) -> None:
        # a bound method would make a cycle, and keep the gradients' shared memory until the next gc
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
        """Make one attempt. After PushPending the next one has no body; after NotHeld it has it again."""
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
