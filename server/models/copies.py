"""Copies of models that are being sent or written to disk: one of each version, shared, and few at once.

A copy is as large as its model, and its readers may be slow. So the number of copies is limited, however many callers
ask for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from pushstep.proto.errors import ExportsBusy

from ..arenas.arenas_copy import ArenasCopy
from ..coordinator.hooks.hook import Point
from .model import Model

COPIES_AT_ONCE: Final = 2
RETRY_AFTER_S: Final = 1.0
T = TypeVar("T")


@dataclass(slots=True)
class _Copy(Generic[T]):
    made: asyncio.Future[T]
    readers: int = 0


class Copies(Generic[T]):
    """Copies of one kind, by their content. A copy is discarded when its last reader has ended."""

    def __init__(self, at_once: int, discard: Callable[[T], object] = lambda _: None) -> None:
        """`discard` releases a copy that has no reader any more."""
        self._at_once = at_once
        self._discard = discard
        self._copies: dict[Hashable, _Copy[T]] = {}

    @asynccontextmanager
    async def shared(self, of: Hashable, make: Callable[[], Awaitable[T]]) -> AsyncIterator[T]:
        """The copy of `of`, made for the first reader and shared by the others.

        ExportsBusy if too many others exist.
        """
        copy = self._copies.get(of)
        if copy is None:
            if len(self._copies) >= self._at_once:
                raise ExportsBusy(count=len(self._copies), retry_after_s=RETRY_AFTER_S)
            copy = self._copies[of] = _Copy(asyncio.ensure_future(make()))
        copy.readers += 1
        try:
            # shielded from one reader's cancellation: others wait for it, and the thread that makes it goes on
            yield await asyncio.shield(copy.made)
        finally:
            copy.readers -= 1
            if not copy.readers:
                # it counts until it is made, although no reader waits for it any more
                copy.made.add_done_callback(lambda _: self._end(of, copy))

    def _end(self, of: Hashable, copy: _Copy[T]) -> None:
        if copy.readers or self._copies.get(of) is not copy:
            return
        del self._copies[of]
        if not copy.made.cancelled() and copy.made.exception() is None:
            self._discard(copy.made.result())


ModelCopies = Copies[tuple[dict[str, Any], ArenasCopy]]


@asynccontextmanager
async def copy_of(copies: ModelCopies, model: Model) -> AsyncIterator[tuple[dict[str, Any], ArenasCopy]]:
    """A shared copy of the model at its current version, for a block.

    ExportsBusy; what `require_whole` raises.
    """
    model.require_whole()

    async def make() -> tuple[dict[str, Any], ArenasCopy]:
        facts, copied = await model.copy()
        await model.recorder.until_shown(copied.version)
        return facts, copied

    model.tell(Point.STATE_DICT_PRE)
    async with copies.shared(model.content, make) as copy:
        yield copy
    model.tell(Point.STATE_DICT_POST)
