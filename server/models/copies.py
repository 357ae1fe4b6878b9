"""Copies of models that are being sent or written to disk: one of each version, shared, and few at once.

A copy is as large as its model, and its readers may be slow. So the number of copies is limited, however many callers
ask for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pushstep.proto.errors import ExportsBusy
from pushstep.proto.shards_pb2 import RankAverage, RankExport
from pushstep.proto.wire.layout import Slot

from ..arenas.arenas_copy import ArenasCopy
from ..coordinator.hooks.chain import HookChain
from ..coordinator.hooks.hook import Point
from ..journal.journal import Level
from ..parts.content import Wanted
from ..parts.gathered import Gathered
from ..parts.looks import Look, Looking, look, look_at_piece
from ..parts.shard import Leader, ModelShard
from ..process.threads import DISK, READS
from ..storage.checkpoints import Content
from ..storage.saved_state import saved_state
from .model import Model

COPIES_AT_ONCE: Final = 2
RETRY_AFTER_S: Final = 1.0
STATE: Final = Content("torch", state=False)
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
async def copy_of(
    copies: ModelCopies, model: Model, folder: Path, content: Content = STATE
) -> AsyncIterator[tuple[dict[str, Any], ArenasCopy]]:
    """A shared copy of the model at its current version, for a block.

    Of a model in several ranks it holds what a checkpoint with `content` does, and lies in a file in `folder`. ExportsBusy; what `require_whole` raises.
    """
    model.require_whole()

    async def make() -> tuple[dict[str, Any], ArenasCopy]:
        leader = model.executor.leader
        if model.shard is None or leader is None:
            facts, copied = await model.copy()
            await model.recorder.until_shown(copied.version)
            return facts, copied
        return await _copy_of_all(model, model.shard, leader, folder, content)

    model.tell(Point.STATE_DICT_PRE)
    async with copies.shared((model.content, model.shard and content.needs), make) as copy:
        yield copy
    model.tell(Point.STATE_DICT_POST)


async def _copy_of_all(
    model: Model, shard: ModelShard, leader: Leader, folder: Path, content: Content
) -> tuple[dict[str, Any], ArenasCopy]:
    wanted = _wanted(model.hooks, content)
    gathered = await DISK.run(Gathered, shard, wanted, folder)
    try:
        # both are queued in this turn of the event loop: behind the same ticket, here and there
        others = leader.export(_order(model, wanted), gathered.taking)
        facts, own = await model.copy()
        await _until_shown(model, leader, own.version)
        return facts, await _whole(gathered, own, others)
    finally:
        gathered.close()


async def whole_snapshot(
    model: Model, manifest: dict[str, Any], own: ArenasCopy, folder: Path, content: Content
) -> tuple[dict[str, Any], ArenasCopy]:
    """A snapshot as it was read here, with the parts of the other ranks, if there are any. As `copy_of`."""
    shard = model.shard
    leader = model.executor.leader
    if shard is None or leader is None:
        return manifest, own
    wanted = _wanted(saved_state(manifest, own, model.name).hooks, content)
    gathered = await DISK.run(Gathered, shard, wanted, folder)
    try:
        # the snapshots of one version are equal in a rank: only rank 0 edits models between two versions
        snapshot = f"t{own.timeline}-v{own.version}-"
        others = leader.export(_order(model, wanted, snapshot), gathered.taking)
        return manifest, await _whole(gathered, own, others)
    finally:
        gathered.close()


async def looked(model: Model, slot: Slot) -> Look:
    """A look at a parameter, wherever it lies. `slot`: of the whole model."""
    arenas, shard = model.arenas, model.shard
    leader = model.executor.leader
    if shard is None or leader is None or shard.part is None:
        found = await model.writer.submit(lambda: look(arenas, slot, 0, slot.stop - slot.start))
        await model.recorder.until_shown(found.version)
        return found
    part, looking = shard.part, Looking(shard, slot)
    model.require_whole()
    # both are queued in this turn of the event loop: behind the same ticket, here and there
    others = leader.export(RankExport(model=model.name, parameter=slot.index), looking.taking)
    own, at = await model.writer.submit(
        lambda: (look_at_piece(arenas, part, slot), (arenas.timeline, arenas.version))
    )
    await _until_shown(model, leader, at[1])
    await others
    return looking.whole(own, at)


async def _until_shown(model: Model, leader: Leader, version: int) -> None:
    await model.recorder.until_shown(version)
    await leader.until(version, safe=model.recorder.level is Level.DURABLE)


async def _whole(gathered: Gathered, own: ArenasCopy, others: Awaitable[None]) -> ArenasCopy:
    await READS.run(gathered.place, own)
    await others
    return await READS.run(gathered.whole, own)


def _wanted(hooks: HookChain, content: Content) -> Wanted:
    kept = hooks.averages()
    return Wanted(
        content.needs.state, {hook: kept[hook] for hook in (content.needs.average,) if hook in kept}
    )


def _order(model: Model, wanted: Wanted, snapshot: str = "") -> RankExport:
    averages = [RankAverage(hook=hook, groups=groups) for hook, groups in wanted.averages.items()]
    return RankExport(model=model.name, snapshot=snapshot, state=wanted.state, averages=averages)
