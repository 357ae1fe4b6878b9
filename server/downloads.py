"""Checkpoints on the disk while they are downloaded: one file of each version and format, shared, and few at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Final

from .copies import Copies
from .export import Checkpoint

FILES_AT_ONCE: Final = 4
PINS_KEPT: Final = 10_000


class Downloads:
    """The files that are there now. Each goes with the last who is sent it, however that ends."""

    def __init__(self) -> None:
        self.pins = Pins()
        self._files: Copies[Checkpoint] = Copies(FILES_AT_ONCE, Checkpoint.close)

    def shared(
        self, of: Hashable, write: Callable[[], Awaitable[Checkpoint]]
    ) -> AbstractAsyncContextManager[Checkpoint]:
        """The file of something, written for whoever asks first. ExportsBusy."""
        return self._files.shared(of, write)


class Pins:
    """What was sent under the name of a version: whoever asks for the rest of it is to get the rest of that.

    A version's number alone does not say what a file holds: groups and buffers change between versions, and numbers
    come again on another timeline or in another model of the name.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[object, ...], str] = {}

    def note(self, name: tuple[object, ...], etag: str) -> str | None:
        """What was sent under this name until now: the ETag of the only thing, "" for several, None for nothing."""
        known = self._sent.pop(name, None)
        self._sent[name] = etag if known in (None, etag) else ""
        if len(self._sent) > PINS_KEPT:
            del self._sent[next(iter(self._sent))]
        return known
