"""The base and the families of the error catalogue: one class per failure, for both sides and both doors.

    PushstepError
      InvalidRequest     the caller sent something that can never work; nothing was changed
      NotFound           the thing named does not exist
      Refused            the request is well-formed but not now, or not from this caller
      Unavailable        try again later, unchanged
      Broken             the server's own fault
      Misuse             raised on the caller's side only

A class carries its code (the machine-readable name, also over REST and in logs), its gRPC and HTTP status and a
message that says what to do. The fields that fill the message travel beside it, so an error that crosses the wire
comes back as the same class (see status.py). No code ever matches on a message's text.
"""

from __future__ import annotations

from typing import ClassVar, Final

import grpc

Status = grpc.StatusCode
# The page with an entry for each code, from the repository's root.
HELP: Final = "docs/troubleshooting.md"


class PushstepError(Exception):
    """Any failure that pushstep names."""

    code: ClassVar[str] = ""
    grpc_status: ClassVar[grpc.StatusCode] = Status.UNKNOWN
    http_status: ClassVar[int] = 500
    template: ClassVar[str] = ""
    _notes: list[str] | None = None

    def __init__(self, message: str | None = None, **fields: object) -> None:
        self.fields: dict[str, str] = {name: str(value) for name, value in fields.items()}
        self.message = self.template.format(**fields) if message is None else message
        super().__init__(self.message)

    @property
    def help(self) -> str:
        """Where it says what this means and what to do; empty for a family, which has no code."""
        return f"{HELP}#{self.code}" if self.code else ""

    @property
    def __notes__(self) -> list[str]:
        """What tracebacks show below the message. Made when one is shown: most errors are never."""
        if self._notes is None:
            self._notes = [f"see {self.help}, or: pushstep explain {self.code}"] if self.help else []
        return self._notes

    @__notes__.setter
    def __notes__(self, notes: list[str]) -> None:
        self._notes = notes

    @property
    def consumed(self) -> bool:
        """Whether the push that failed has used up its sequence: a retry gets this error again."""
        return self.fields.get("consumed") == "True"

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks to wait before another attempt; None if it does not ask."""
        text = self.fields.get("retry_after_s")
        return None if text is None else float(text)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.fields))


def _rebuild(kind: type[PushstepError], message: str, fields: dict[str, str]) -> PushstepError:
    return kind(message, **fields)


class InvalidRequest(PushstepError):
    """The caller sent something that can never work; nothing was changed."""

    grpc_status = Status.INVALID_ARGUMENT
    http_status = 422


class NotFound(PushstepError):
    """The thing named does not exist."""

    grpc_status = Status.NOT_FOUND
    http_status = 404


class Refused(PushstepError):
    """The request is well-formed but not now, or not from this caller."""

    grpc_status = Status.FAILED_PRECONDITION
    http_status = 409


class Unavailable(PushstepError):
    """Try again later, unchanged."""

    grpc_status = Status.UNAVAILABLE
    http_status = 503


class Broken(PushstepError):
    """The server's own fault."""

    grpc_status = Status.INTERNAL
    http_status = 500


class Misuse(PushstepError):
    """Raised on this side only, before anything was sent."""

    grpc_status = Status.UNKNOWN
    http_status = 0
