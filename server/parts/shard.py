"""Which part of a model lies in this rank, and who tells the other ranks what is decided about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import xxhash

from pushstep.proto.errors import PushstepError
from pushstep.proto.shards_pb2 import RankContent, RankExport
from pushstep.proto.training_pb2 import PullOptions, PushCommit, Shard, ShardMap
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import Part, cut, taking_part

from ..coordinator.decision import Reduce, Resolve, Step
from ..coordinator.push import PendingPush
from ..staging.gradient import StagedPush
from .row_reads import RowOrders


class Taker(Protocol):
    """Where what one rank sends goes, message by message."""

    def take(self, message: RankContent) -> None:
        """Take the next message. It blocks."""


class Leader(Protocol):
    """What rank 0 does about one model for the other ranks. Called on the event loop only."""

    reads: RowOrders

    async def gather(self, pending: PendingPush, commit: PushCommit) -> None:
        """Wait until every rank has its part of a push; make of the parts what the coordinator judges."""

    def refused(self, pending: PendingPush, error: Exception) -> None:
        """The coordinator has not taken a complete push: the others forget their parts."""

    def ticket(self, step: Step) -> None:
        """Send a step's ticket to the others."""

    def lrs(self, version: int, here: Mapping[int, float]) -> dict[int, float]:
        """Each group's learning rate in a step, by the steps of its first parameter, wherever it lies. `here`: this rank's."""

    def resolved(self, resolve: Resolve) -> None:
        """A push has an outcome without a step, or an error: the others forget their parts."""

    async def reduce(self, reduce: Reduce, own: StagedPush) -> StagedPush:
        """Have the others add up their parts of a round; the sum as a whole. `own`: this rank's."""

    def when_all(self, version: int, *, safe: bool, then: Callable[[], None]) -> None:
        """Call `then` once every rank has taken the step to a version, or has it on the disk if `safe`."""

    async def until(self, version: int, *, safe: bool) -> None:
        """Wait for that."""

    def reached(self) -> dict[int, int]:
        """The version that each other rank has come to."""

    def publish(self, timeline: int, version: int, options: PullOptions) -> None:
        """Have the others keep the version that they are at here in the order of tickets, for one reader."""

    def snapshot(self, *, automatic: bool) -> Awaitable[list[dict[str, Any]]]:
        """Have the others begin a snapshot of the version that is the newest now; what they have written, once all have."""

    def snapshot_committed(self, version: int) -> None:
        """Rank 0's snapshot of a version is on its disk: the others may remove older ones."""

    def publish_state(self, version: int) -> None:
        """Have the others copy everything of the version that they are at here, for one reader."""

    def export(self, order: RankExport, taking: Callable[[RankContent], Taker]) -> Awaitable[None]:
        """Have the others send all that they have of the version that they are at here, or of a snapshot; wait for it."""

    async def set_durability(self, settings: str) -> None:
        """Have the others keep their parts on the disk in another way (JSON), and wait. Raises the first refusal."""

    def failed(self, error: Exception) -> None:
        """A step has failed here: the ranks are not at one version any more."""


class ModelShard:
    """One model, as it lies in the ranks of a job."""

    def __init__(self, whole: Layout, rank: int, addresses: list[Shard]) -> None:
        """`addresses`: of all ranks, in order, without hashes."""
        self.whole = whole
        self.rank = rank
        self.parts = cut(whole, len(addresses))
        self.leader: Leader | None = None
        self._addresses = addresses

    @property
    def part(self) -> Part | None:
        """This rank's part."""
        return self.parts[self.rank]

    @property
    def ranks(self) -> list[int]:
        """The ranks that have a part, in order."""
        return [part.rank for part in self.parts if part is not None]

    @property
    def others(self) -> list[int]:
        """The ranks above 0 that have a part."""
        return self.ranks[1:]

    @cached_property
    def map(self) -> ShardMap:
        """Where the parts are, for workers."""
        made = ShardMap(world=taking_part(self.whole, len(self.parts)))
        for part in self.parts:
            if part is not None:
                shard = made.shards.add()
                shard.CopyFrom(self._addresses[part.rank])
                shard.manifest_hash = part.layout.manifest_hash
        made.version = xxhash.xxh3_64_intdigest(made.SerializeToString(deterministic=True)) or 1
        return made


@dataclass(frozen=True, slots=True)
class Survey:
    """What a rank has of one model on its disk."""

    uid: bytes = b""
    timeline: int = 0
    version: int = 0
    manifest_hash: int = 0
    # the timeline that its identity names, which may be a later one
    identity_timeline: int = 0
    # nothing that was ever called safe can be missing
    proven: bool = False
    # the versions that it can go back to: runs, both ends included
    reaches: Sequence[tuple[int, int]] = ()
    # the ranks above 0 that have a part of it
    others: Sequence[int] = ()
    problem: PushstepError | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a rank's part of a model is to go on."""

    # back to this version, on this timeline; None: as it is
    version: int | None = None
    timeline: int | None = None
    # it is not served, and stays on the disk as it is
    refused: PushstepError | None = None
    # it is set aside: its creation broke off
    aside: bool = False


class Laid(Protocol):
    """What has a layout, and may be a part of a whole."""

    layout: Layout
    shard: ModelShard | None


def whole_of(model: Laid) -> Layout:
    """The layout of the whole model, wherever its parts lie."""
    return model.layout if model.shard is None else model.shard.whole


class LedModel(Protocol):
    """A model, as far as the others have to know it."""

    name: str
    uid: bytes
    shard: ModelShard | None


class Ranks(Protocol):
    """The ranks of a job, as the catalog of each knows them."""

    rank: int
    world: int

    def shard(self, whole: Layout) -> ModelShard:
        """How a model lies in the ranks."""

    async def meet(self, found: Mapping[str, Survey]) -> Mapping[str, Goal]:
        """Where each model that is here goes on, once all ranks have said what they have. Those not in it: as they are."""

    async def met(self) -> None:
        """Every model that is here is where it is to go on. Rank 0: wait for the others."""

    def loaded(self, model: LedModel) -> None:
        """A model is made, or loaded: rank 0 leads it, the others follow."""

    def announce(self, model: str, ticket: int, shard: ModelShard) -> None:
        """Tell the others of a model that is about to be uploaded under a ticket. Again: nothing."""

    async def uploaded(self, model: str, ticket: int) -> bytes:
        """The uid that the model gets, once every rank has its part. Raises what one of them was refused with."""

    async def commit(self, model: LedModel, ticket: int) -> None:
        """Lead a model that is about to be made, and have the others make theirs."""

    def withdraw(self, model: str, ticket: int) -> None:
        """A creation has come to nothing."""

    async def delete(self, model: str, uid: bytes) -> None:
        """Have the others delete a model, and wait."""
