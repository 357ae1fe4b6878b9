"""A worker's own bytes, which travel with its next push and lie with the model."""

from __future__ import annotations

from .member import Member


class WorkerState:
    """Owns the bytes that were set here, and knows whether a push has carried them."""

    def __init__(self) -> None:
        self._value: bytes | None = None
        self._is_due = False

    def value(self, member: Member | None) -> bytes:
        """The bytes that were set here, or else those that the membership came with."""
        if self._value is None and member is not None:
            return bytes(member.worker_state)
        return self._value or b""

    def set(self, value: bytes) -> None:
        """Have the next push carry `value`. TypeError if it is not bytes."""
        if not isinstance(value, bytes):
            raise TypeError(f"worker_state is bytes, not {type(value).__name__}")
        self._value, self._is_due = value, True

    def due(self) -> bytes | None:
        """The bytes that the next push carries; None if the server has them."""
        return self._value if self._is_due else None

    def arrived(self, value: bytes) -> None:
        """Note that a push has carried `value`. Bytes that were set since are still due."""
        if value == (self._value or b""):
            self._is_due = False

    def rejoined(self) -> None:
        """Send the bytes again: a restored model may hold older ones."""
        self._is_due = self._value is not None
