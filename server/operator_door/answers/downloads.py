"""Checkpoints on disk while they are downloaded: one shared file of each version and format, few at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Final

from ...models.copies import Copies
from ...storage.checkpoints import Checkpoint

FILES_AT_ONCE: Final = 4
PINS_KEPT: Final = 10_000


class Downloads:
    """The checkpoint files that exist now. A file is closed when its last download ends in any way."""

    def __init__(self) -> None:
        self.pins = Pins()
        self._files: Copies[Checkpoint] = Copies(FILES_AT_ONCE, Checkpoint.close)

    def shared(
        self, of: Hashable, write: Callable[[], Awaitable[Checkpoint]]
    ) -> AbstractAsyncContextManager[Checkpoint]:
        """The file of `of`, written for the first caller and shared by the others.

        ExportsBusy if too many others exist.
        """
        return self._files.shared(of, write)


class Pins:
    """Which file was sent for a version, so that a resumed download gets the rest of that file.

    A version's number alone does not identify a file's content: groups and buffers change between versions, and the
    same numbers occur on another timeline or in another model of the name.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[object, ...], str] = {}

    def note(self, name: tuple[object, ...], etag: str) -> str | None:
        """Note what is sent under a name.

        Returns what was before: the only ETag, "" for several, None for nothing.
        """
        known = self._sent.pop(name, None)
        self._sent[name] = etag if known in (None, etag) else ""
        if len(self._sent) > PINS_KEPT:
            del self._sent[next(iter(self._sent))]
        return known
