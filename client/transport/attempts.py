"""The attempts of one request, which `Retry` repeats until it is answered.

The server answers a push that waits for other workers with `push_pending` from time to time. The server then holds the
push's body, so the next attempt goes without a body and attaches to the pending push.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import grpc

from pushstep.proto.errors import Broken, ModelFailed, NotHeld, PushPending, TokenRevoked
from pushstep.proto.training_pb2 import PushCommit, PushHeader
from pushstep.proto.wire.layout import Layout

from .retry import TransportFailure, failure_of
from .streams import Body

T = TypeVar("T")
NOTHING: Final = Body((), ())


class Attempts(ABC, Generic[T]):
    """A call makes one attempt. `in_doubt`: an attempt without an answer may have been applied."""

    def __init__(self) -> None:
        self.in_doubt = False

    @abstractmethod
    def _attempt(self) -> T:
        """Send the request and wait for its answer."""

    def __call__(self) -> T:
        """Make one attempt: its answer. The catalogue's error, or TransportFailure if there was no answer."""
        try:
            return self._attempt()
        except grpc.RpcError as error:
            failure = failure_of(error)
            self._note(failure)
            if failure is error:
                raise
            raise failure from error
        except Exception as error:
            self._note(error)
            raise

    def _note(self, failure: Exception) -> None:
        # a failed model applies nothing until a restore, and the restore supersedes this request
        # a call whose token was revoked may have been complete
        unsure = (TransportFailure, Broken, TokenRevoked)
        if isinstance(failure, unsure) and not isinstance(failure, ModelFailed):
            self.in_doubt = True


class Uploading(Attempts[T]):
    """The attempts of an upload."""

    def __init__(self, send: Callable[[], T]) -> None:
        super().__init__()
        self._send = send

    def _attempt(self) -> T:
        return self._send()


class Sending(Attempts[T]):
    """The attempts of a push by `send`; `begun` finishes a first attempt that is under way."""

    def __init__(
        self,
        send: Callable[[PushHeader, Body, PushCommit, Layout], T],
        header: PushHeader,
        body: Body,
        commit: PushCommit,
        layout: Layout,
        begun: Callable[[PushCommit], T] | None = None,
    ) -> None:
        super().__init__()
        self._send = send
        self._header = header
        self._body = body
        self._commit = commit
        self._layout = layout
        self._begun = begun

    def _attempt(self) -> T:
        begun = self._begun
        if begun is not None:
            self._begun = None
            return begun(self._commit)
        body = NOTHING if self._header.held_digest else self._body
        return self._send(self._header, body, self._commit, self._layout)

    def _note(self, failure: Exception) -> None:
        """After PushPending the next attempt has no body; after NotHeld it has it again."""
        super()._note(failure)
        if isinstance(failure, PushPending):
            self._header.held_digest = int(failure.fields["digest"])
            self.in_doubt = True
        elif isinstance(failure, NotHeld):
            self._header.held_digest = 0
