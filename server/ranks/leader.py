"""What rank 0 does about one model for the other ranks: gathers the parts of pushes, sends tickets, waits for steps.

A push reaches the coordinator once its own part and those of all other ranks that it names are there and whole. So a
ticket is only ever written for what every rank has staged. A push is resolved when every rank has taken its step: at
`durable`, when every rank has it on the disk. A part that no ticket comes for is dropped, by an order.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from pushstep.proto.errors import (
    DigestMismatch,
    Draining,
    MalformedFrame,
    ModelLost,
    NotHeld,
    StreamStalled,
)
from pushstep.proto.shards_pb2 import (
    RankDrop,
    RankDurability,
    RankExport,
    RankHooks,
    RankOrder,
    RankPublish,
    RankSnapshot,
    RankStaged,
    RankStepped,
    RankSums,
    RankTicket,
)
from pushstep.proto.training_pb2 import PartDigest, PullOptions, PushCommit
from pushstep.proto.types_pb2 import Identity
from pushstep.proto.wire.hyperparameters import values_of

from ..arenas.rules import rule_of
from ..coordinator.decision import Reduce, Resolve, Step
from ..coordinator.push import Key, PendingPush, key_of, keys_of
from ..links.hub import Hub, Receive
from ..links.words import heard, said
from ..models.model import Model
from ..parts.arrival import Arrival, together
from ..parts.row_reads import RowOrders
from ..parts.shard import ModelShard
from ..parts.sums import Whole, measures, rows_of, with_steps_elsewhere
from ..process.inline import INLINE_PARTS
from ..process.threads import PUSHES
from ..staging.gradient import RowsPart, StagedPush
from .round_sums import RoundSums

# How long a push waits for the parts that its sender has promised, and a part for its push.
GATHER_S: Final = 60.0


class RankLeader:
    """One model's leader. It lives in rank 0, on the event loop."""

    def __init__(
        self, hub: Hub, model: Model, shard: ModelShard, on_failure: Callable[[Exception], None]
    ) -> None:
        self._hub = hub
        self._model = model
        self._shard = shard
        self._on_failure = on_failure
        self._arrivals: dict[Key, Arrival] = {}
        self._stepped = dict.fromkeys(shard.others, model.version)
        self._safe = dict.fromkeys(shard.others, model.version)
        self._waiting: deque[tuple[int, bool, Callable[[], None]]] = deque()
        # readers who wait for the others' steps
        self._awaited: set[asyncio.Future[None]] = set()
        # by group, the steps of its first parameter, where that begins in another rank; and such groups' learning rates by version
        held = {} if shard.part is None else shard.part.by_whole
        firsts = shard.whole.first_of_group.items()
        self._elsewhere = {group: 0 for group, slot in firsts if slot.index not in held}
        self._lrs: dict[int, dict[int, float]] = {}
        self._rounds = RoundSums(hub, model.name, shard.others)
        self.reads = RowOrders(model.name, shard.others, hub.send)
        # the hooks that keep averages, as the others know them
        self._hooks: list[str] = []

    # Parts of pushes.

    def staged(self, rank: int, message: RankStaged) -> None:
        """A rank has its part of a push."""
        decided = self._model.coordinator.decided_of(message.identity)
        if decided is not None:
            drop = RankDrop(model=self._model.name, identity=message.identity, receipt=decided.receipt)
            self._hub.send([rank], RankOrder(drop=drop))
            return
        arrival = self._arrival(key_of(message.identity))
        arrival.staged[rank] = message
        arrival.changed.set()

    def _arrival(self, key: Key) -> Arrival:
        known = self._arrivals.get(key)
        if known is None:
            known = self._arrivals[key] = Arrival(self._model.clock())
        return known

    async def gather(self, pending: PendingPush, commit: PushCommit) -> None:
        """See `Leader.gather`. MalformedFrame, DigestMismatch; StreamStalled if a part does not come; Draining at the end."""
        await self._gathered(pending, commit)
        self._require_open()

    def _require_open(self) -> None:
        if self._hub.closing:
            raise Draining()
        if self._model.deleted:
            raise ModelLost(model=self._model.name)

    async def _gathered(self, pending: PendingPush, commit: PushCommit) -> None:
        promised = self._promised(commit.parts)
        pending.digest = together(pending.digest, promised)
        if pending.header.skip:
            if promised:
                raise MalformedFrame(problem="a skip push has no parts")
            return
        if not promised and not pending.header.segments:
            raise MalformedFrame(problem="a push must hold at least one gradient, in some rank")
        if self._is_known(pending.identity):
            return  # a retry: its digest is compared, and nothing is stepped
        arrival = await self._arrived(pending.key, promised)
        for rank, digest in promised.items():
            if arrival.staged[rank].digest != digest:
                raise DigestMismatch(got=arrival.staged[rank].digest, expected=digest)
        faults = [arrival.staged[rank].fault for rank in promised if arrival.staged[rank].HasField("fault")]
        if pending.fault is not None or pending.push is None:
            return
        if faults:
            pending.push, pending.fault = None, heard(faults[0])
            return
        few = sum(len(arrival.staged[rank].sums.sums) for rank in promised) + pending.push.parameters
        pending.push = await PUSHES.run_unless(
            few <= INLINE_PARTS,
            self._whole,
            pending.push,
            {rank: arrival.staged[rank].sums for rank in promised},
        )

    def _promised(self, parts: Iterable[PartDigest]) -> dict[int, int]:
        """The ranks that a commit names, with what they were sent. MalformedFrame."""
        found: dict[int, int] = {}
        for part in parts:
            if part.rank not in self._stepped or part.rank in found:
                raise MalformedFrame(problem=f"rank {part.rank} has no part of this model, or is named twice")
            if not part.digest:
                raise MalformedFrame(problem=f"the part of rank {part.rank} has no digest")
            found[int(part.rank)] = int(part.digest)
        return found

    def _is_known(self, identity: Identity) -> bool:
        worker = self._model.sessions.workers.get(identity.worker)
        if worker is not None and worker.epoch == identity.epoch and identity.sequence in worker.undecided:
            return True
        return self._model.coordinator.decided_of(identity) is not None

    async def _arrived(self, key: Key, promised: dict[int, int]) -> Arrival:
        arrival = self._arrival(key)
        arrival.waiting += 1
        try:
            async with asyncio.timeout(GATHER_S):
                while not promised.keys() <= arrival.staged.keys():
                    arrival.changed.clear()
                    await arrival.changed.wait()
        except TimeoutError as error:
            raise StreamStalled(seconds=GATHER_S) from error
        finally:
            arrival.waiting -= 1
            arrival.since_s = self._model.clock()
            if not (arrival.waiting or arrival.staged) and self._arrivals.get(key) is arrival:
                del self._arrivals[key]  # its sender has gone, and no rank has a part of it
        return arrival

    def _whole(self, here: StagedPush, said_by: Mapping[int, RankSums]) -> StagedPush:
        """A push as a whole. `here`: this rank's part."""
        part = self._shard.part
        if part is None:
            raise MalformedFrame(problem="rank 0 has no part of this model")
        whole = Whole(self._shard.whole)
        whole.add(part, measures(here, part))
        for rank, sums in sorted(said_by.items()):
            of = self._shard.parts[rank]
            if of is None:
                raise MalformedFrame(problem=f"rank {rank} has no part of this model")
            whole.add(of, sums)
        made = whole.push(here)
        return replace(made, here=with_steps_elsewhere(here, part, rows_of(made)))

    def refused(self, pending: PendingPush, error: Exception) -> None:
        """The coordinator has not taken a complete push: the others forget their parts, unless it is held all the same."""
        if not self._is_known(pending.identity):
            self._drop(pending.key, pending.identity, error)

    def resolved(self, resolve: Resolve) -> None:
        """A push has an outcome without a step, or an error: the others forget their parts."""
        pending = resolve.pending
        if resolve.decided is not None:
            drop = RankDrop(
                model=self._model.name, identity=pending.identity, receipt=resolve.decided.receipt
            )
            self._send_drop(pending.key, drop)
        else:
            error = resolve.error or NotHeld(worker=pending.worker, sequence=pending.identity.sequence)
            self._drop(pending.key, pending.identity, error)

    def _drop(self, key: Key, identity: Identity, error: Exception) -> None:
        self._send_drop(key, RankDrop(model=self._model.name, identity=identity, error=said(error)))

    def _send_drop(self, key: Key, drop: RankDrop) -> None:
        arrival = self._arrivals.pop(key, None)
        if arrival is not None:
            self._hub.send(arrival.staged, RankOrder(drop=drop))

    def sweep(self) -> None:
        """Have parts forgotten whose push has not come: its worker has gone, or sends it anew."""
        now_s = self._model.clock()
        for key, arrival in list(self._arrivals.items()):
            if arrival.waiting or now_s - arrival.since_s < GATHER_S:
                continue
            identity = next(iter(arrival.staged.values())).identity
            if not self._is_known(identity):
                self._drop(key, identity, NotHeld(worker=identity.worker, sequence=identity.sequence))

    # Steps.

    def ticket(self, step: Step) -> None:
        """Send a step's ticket to the others."""
        self._tell_hooks()
        ticket = step.ticket
        if self._elsewhere:
            self._lrs[int(ticket.version)] = self._lrs_elsewhere(step)
        for key in keys_of(ticket):
            self._arrivals.pop(key, None)
        message = RankTicket(
            model=self._model.name,
            uid=self._model.uid,
            timeline=self._model.timeline,
            ticket=ticket,
            by_rows=rows_of(step.push),
            reduce=step.push.reduce,
        )
        self._hub.send(self._stepped, RankOrder(ticket=message))

    def begun(self, group: int, steps: int) -> None:
        """How many steps the first parameter of a group has taken, which begins in another rank."""
        if group in self._elsewhere:
            self._elsewhere[group] = steps

    def _lrs_elsewhere(self, step: Step) -> dict[int, float]:
        """The learning rates of the groups whose first parameter begins in another rank, and count its step."""
        ticket, whole = step.ticket, self._shard.whole
        touched = {
            slot.index
            for part in step.push.parts
            for slot in ((part.slot,) if isinstance(part, RowsPart) else part.slots)
        }
        found = {}
        for group in self._elsewhere:
            frozen = group in ticket.frozen
            if whole.first_of_group[group].index in touched and not frozen:
                self._elsewhere[group] += 1
            rule, values = rule_of(whole, group), values_of(ticket.groups[group])
            lr = rule.effective_lr(values, max(1, self._elsewhere[group])) * ticket.lr_scale
            found[group] = 0.0 if frozen else lr
        return found

    def lrs(self, version: int, here: Mapping[int, float]) -> dict[int, float]:
        """Each group's learning rate in a step, by the steps of its first parameter, wherever it lies. `here`: this rank's."""
        return dict(sorted({**here, **self._lrs.pop(version, {})}.items()))

    def stepped(self, rank: int, message: RankStepped) -> None:
        """A rank has taken steps, or has them on its disk."""
        if message.timeline != self._model.timeline:
            return
        self._stepped[rank] = max(self._stepped[rank], int(message.version))
        self._safe[rank] = max(self._safe[rank], int(message.safe_version))
        stepped, safe = min(self._stepped.values()), min(self._safe.values())
        while self._waiting:
            version, is_safe, then = self._waiting[0]
            if version > (safe if is_safe else stepped):
                return
            self._waiting.popleft()
            then()

    def when_all(self, version: int, *, safe: bool, then: Callable[[], None]) -> None:
        """Call `then` once every rank has taken the step to a version, or has it on the disk if `safe`."""
        reached = self._safe if safe else self._stepped
        if not self._waiting and version <= min(reached.values(), default=version):
            then()
        else:
            self._waiting.append((version, safe, then))

    async def until(self, version: int, *, safe: bool) -> None:
        """Wait for that."""
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.add(reached)
        self.when_all(version, safe=safe, then=lambda: None if reached.done() else reached.set_result(None))
        try:
            await reached
        finally:
            self._awaited.discard(reached)

    def reached(self) -> dict[int, int]:
        """The version that each other rank has come to."""
        return self._stepped.copy()

    def publish(self, timeline: int, version: int, options: PullOptions) -> None:
        """Have the others keep the version that they are at here in the order of tickets, for one reader."""
        order = RankPublish(model=self._model.name, timeline=timeline, version=version, dtype=options.dtype)
        if options.HasField("have_version"):
            order.have_version = options.have_version
        self._hub.send(self._stepped, RankOrder(publish=order))

    def snapshot(self, *, automatic: bool) -> Awaitable[list[dict[str, Any]]]:
        """Have the others begin a snapshot of the version that is the newest now; what they have written, once all have."""
        order = RankSnapshot(model=self._model.name, version=self._model.version, automatic=automatic)
        answers = self._hub.asked(self._stepped, RankOrder(snapshot=order))

        async def written() -> list[dict[str, Any]]:
            await asyncio.gather(*answers.values())
            said_by = ((rank, answer.result()) for rank, answer in answers.items())
            return [
                {"rank": rank, "snapshot": done.snapshot, "digest": f"{done.digest:016x}"}
                for rank, done in said_by
            ]

        return asyncio.ensure_future(written())

    def snapshot_committed(self, version: int) -> None:
        """Rank 0's snapshot of a version is on its disk: the others may remove older ones."""
        order = RankSnapshot(model=self._model.name, version=version, committed=True)
        self._hub.send(self._stepped, RankOrder(snapshot=order))

    def _tell_hooks(self) -> None:
        """Tell the others which averages are kept, if that has changed since they were told."""
        kept = [hook.hook_id for hook in self._model.hooks.list if hook.averages()]
        if kept != self._hooks:
            self._hooks = kept
            dumped = [entry for entry in self._model.hooks.dump() if entry["id"] in kept]
            order = RankHooks(model=self._model.name, hooks=json.dumps(dumped))
            self._hub.send(self._stepped, RankOrder(hooks=order))

    def publish_state(self, version: int) -> None:
        """Have the others copy everything of the version that they are at here, for one reader."""
        order = RankPublish(model=self._model.name, version=version, state=True)
        self._hub.send(self._stepped, RankOrder(publish=order))

    def export(self, order: RankExport, taking: Receive) -> Awaitable[None]:
        """Have the others send all that they have of the version that they are at here, or of a snapshot; wait for it."""
        return self._hub.received(self._stepped, RankOrder(export=order), taking)

    async def set_durability(self, settings: str) -> None:
        """Have the others keep their parts on the disk in another way, and wait. Raises what one of them was refused with."""
        order = RankDurability(model=self._model.name, settings=settings)
        await self._hub.ask(self._stepped, RankOrder(durability=order))

    def failed(self, error: Exception) -> None:
        """A step has failed here: the ranks are not at one version any more. Of a model that is deleted none has to be."""
        if not self._model.deleted:
            self._on_failure(error)

    def end(self) -> None:
        """The model is deleted: what the others say of it is not heard any more."""
        self.reads.end()
        self._rounds.end()
        for awaited in self._awaited:
            if not awaited.done():
                awaited.set_exception(ModelLost(model=self._model.name))

    async def reduce(self, reduce: Reduce, own: StagedPush) -> StagedPush:
        """Have the others add up their parts of a round; the sum as a whole. `own`: this rank's."""
        self._require_open()
        number, said_by = await self._rounds.added(reduce)
        made = await PUSHES.run(self._whole, own, said_by)
        self._require_open()
        return replace(made, reduce=number)

    def summed(self, rank: int, message: RankSums) -> None:
        """A rank has added up its parts of a round."""
        self._rounds.summed(rank, message)
