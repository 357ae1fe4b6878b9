"""What a rank above 0 does with its part of one model: holds staged parts, executes tickets in order, keeps versions.

Nothing is decided here. Tickets, drops and the marks of versions to keep come in one order from rank 0, and enter the
writer's queue in that order. So what is kept as version v is exactly version v.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pushstep.proto.errors import Conflict, NotHeld, PushPending, PushstepError, VersionGone
from pushstep.proto.shards_pb2 import (
    RankDrop,
    RankHooks,
    RankMessage,
    RankPublish,
    RankRead,
    RankReduce,
    RankStaged,
    RankStepped,
    RankSums,
    RankTicket,
)
from pushstep.proto.training_pb2 import PullOptions
from pushstep.proto.types_pb2 import Identity
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import values_of
from pushstep.proto.wire.shards import Part

from ..arenas.arenas_copy import ArenasCopy
from ..arenas.gradients import bytes_of_change
from ..arenas.publisher import Published
from ..arenas.writer import SmallSteps
from ..coordinator.decision import Step
from ..coordinator.groups import ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.push import Key, key_of, keys_of
from ..journal.entry import Entry
from ..journal.journal import Level
from ..links.words import heard, said
from ..models.model import Model
from ..parts.exact import ExactAnswer
from ..parts.row_reads import RowReads
from ..parts.sums import measures, with_steps_elsewhere
from ..process.threads import PUSHES
from ..staging import reduction
from ..staging.gradient import StagedPush

log = logging.getLogger("pushstep.ranks")
NOTHING: Final = StagedPush(0, [], None, 0.0)
# How long a version is kept for the one who asked rank 0 for it, and how long a pull waits for a version to come.
KEEP_S: Final = 20.0
# A mark of a version: timeline, version, dtype, and the version that the reader has.
Mark = tuple[int, int, int, int | None]


@dataclass(slots=True, eq=False)
class HeldPart:
    """One push's part, until rank 0 has said what becomes of it."""

    identity: Identity
    digest: int
    push: StagedPush | None
    release: Callable[[], None]
    answer: ExactAnswer | None
    # done when its step is taken, or the part was dropped; an error if it never will be
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_stepped: bool = False


class Follower:
    """One model's part in a rank above 0. Called on the event loop only."""

    def __init__(
        self,
        model: Model,
        part: Part,
        say: Callable[[RankMessage], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.model = model
        self.part = part
        self._say = say
        self._on_failure = on_failure
        self._held: dict[Key, HeldPart] = {}
        self._kept: dict[Mark, asyncio.Future[Published]] = {}
        # copies of everything, by version
        self._states: dict[int, asyncio.Future[ArenasCopy]] = {}
        self._sums: dict[int, asyncio.Task[StagedPush]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._small = SmallSteps(lambda group: model.groups.list[group].values)
        self._safe_version = model.version
        self.reads = RowReads(model.name, part.rank, model.arenas, model.writer, say)

    # Parts.

    def held(self, identity: Identity) -> HeldPart | None:
        """The part that is held of a push."""
        return self._held.get(key_of(identity))

    @property
    def parts_held(self) -> int:
        """Parts that are complete, and whose push rank 0 has not decided."""
        return len(self._held)

    def hold(self, part: HeldPart, fault: PushstepError | None, blocks: dict[int, list[float]]) -> HeldPart:
        """Hold a complete part, and tell rank 0. A copy of one that is held joins it. Conflict."""
        key = key_of(part.identity)
        known = self._held.get(key)
        if known is not None:
            part.release()
            if known.digest != part.digest:
                raise Conflict(worker=part.identity.worker, sequence=part.identity.sequence)
            return known
        self._held[key] = part
        message = RankStaged(model=self.model.name, identity=part.identity, digest=part.digest)
        if fault is not None:
            message.fault.CopyFrom(said(fault))
        elif part.push is not None:
            message.sums.CopyFrom(measures(part.push, self.part, blocks))
        self._say(RankMessage(staged=message))
        return part

    async def outcome(self, part: HeldPart, hold_s: float) -> None:
        """Wait until a part's step is taken, or the part is not needed any more. PushPending; what it was dropped with."""
        try:
            async with asyncio.timeout(hold_s):
                await asyncio.shield(part.done)
        except TimeoutError as error:
            raise PushPending(
                worker=part.identity.worker,
                policy="",
                why="rank 0 has not decided",
                digest=part.digest,
                retry_after_s=0.0,
            ) from error

    def drop(self, order: RankDrop) -> None:
        """Forget a part: rank 0 has another outcome for its push, or none."""
        part = self._held.pop(key_of(order.identity), None)
        if part is None:
            return
        part.release()
        if order.HasField("error"):
            _fail(part.done, heard(order.error))
        elif not part.done.done():
            part.done.set_result(None)

    # Steps.

    def ticket(self, order: RankTicket) -> None:
        """Execute a ticket, behind all earlier ones."""
        model, ticket = self.model, order.ticket
        parts = [self._held.pop(key, None) for key in keys_of(ticket)]
        pushes = [NOTHING if part is None or part.push is None else part.push for part in parts]
        pushes[0] = with_steps_elsewhere(pushes[0], self.part, order.by_rows)
        if order.reduce:
            summed = self._sums.pop(int(order.reduce)).result()
            push = with_steps_elsewhere(summed, self.part, order.by_rows)
        else:
            push = pushes[0]
        model.commits.version = int(ticket.version)
        for group, now in zip(model.groups.list, ticket.groups, strict=True):
            group.values = values_of(now)
        model.groups.note_rows(push.parts)
        step = Step(ticket, push, (), {}, model.hooks.dump() if model.hooks.list else (), pushes)
        entry = model.recorder.step(step)
        held = [part for part in parts if part is not None]
        self._take(step, entry, held)
        for mark, kept in list(self._kept.items()):
            if mark[1] == ticket.version and not kept.done():
                self._publish(mark)

    def _take(self, step: Step, entry: Entry | None, held: Sequence[HeldPart]) -> None:
        model, arenas, push = self.model, self.model.arenas, step.push
        answers = [part.answer for part in held if part.answer is not None]
        changed_bytes = bytes_of_change(step.ticket, push.parts)
        if changed_bytes:
            model.staging.count(changed_bytes)

        def execute() -> float:
            model.require_steppable()
            if entry is not None:
                entry.append()
            begun_s = model.clock()
            with arenas.device_stream.over([push]):
                arenas.step(step.ticket, push.parts, None, model.staging.buffer)
            took_s = model.clock() - begun_s
            for answer in answers:
                answer.after_step(arenas, None)
            return took_s

        small = self._small.has(step.ticket, push, sum([answer.nbytes for answer in answers]))
        # the event loop does not wait for the disk
        job = model.writer.submit(execute, small=small and entry is None)

        def finish(done: asyncio.Future[float]) -> None:
            if changed_bytes:
                model.staging.release(changed_bytes)
            error = done.exception()
            if error is not None:
                failure = model.broke_off(error, int(step.ticket.version))
                if not model.deleted:
                    self._on_failure(failure)
                for part in held:
                    part.release()
                    _fail(part.done, failure)
                return
            model.note_nonfinite()
            # once for each push, as rank 0 does
            for _ in step.parts:
                model.counts.step.observe(done.result())
            self._stepped(int(step.ticket.version), entry)
            for part in held:
                part.is_stepped = True
                part.release()
                if not part.done.done():
                    part.done.set_result(None)

        if job.done():
            finish(job)
        else:
            job.add_done_callback(finish)

    def _stepped(self, version: int, entry: Entry | None) -> None:
        """Tell rank 0: at once, and again once it is on the disk, if it has to be."""
        if entry is None:
            self._tell(version)
            return
        if entry.level is not Level.DURABLE:
            self._tell(version)

        def safe() -> None:
            self._safe_version = max(self._safe_version, version)
            self._tell(version)

        self.model.recorder.when_safe(entry.number, entry.level, safe)

    def _tell(self, version: int) -> None:
        message = RankStepped(
            model=self.model.name,
            timeline=self.model.timeline,
            version=version,
            safe_version=self._safe_version,
        )
        self._say(RankMessage(stepped=message))

    def hooks(self, order: RankHooks) -> None:
        """Keep the averages of these hooks, and of no others, from the next ticket on."""
        model = self.model
        chain = HookChain.parsed(json.loads(order.hooks), ParamGroups.parse(model.groups.dump()), model.name)
        model.hooks.become(chain)
        arenas, wanted = model.arenas, model.hooks.averages()
        model.writer.write(lambda: arenas.averages.keep(wanted, arenas.layout, arenas.parameters))

    # Rounds.

    def reduce(self, order: RankReduce) -> None:
        """Add up the parts of a round, and tell rank 0 its sums of squares."""
        number = int(order.reduce)
        weights, pushes = [], []
        for of in order.contributions:
            part = self._held.get(key_of(of.identity))
            if part is not None and part.push is not None:
                pushes.append(part.push)
                weights.append(of.weight)
        adding = asyncio.ensure_future(PUSHES.run(reduction.add_up, pushes, weights, order.divisor))
        # rounds are stepped one after the other: no ticket comes for an earlier one any more
        self._sums = {number: adding}
        self._start(self._say_sums(number, adding))

    async def _say_sums(self, number: int, adding: asyncio.Future[StagedPush]) -> None:
        sums = RankSums()
        try:
            sums = measures(await adding, self.part)
        except Exception as error:  # noqa: BLE001 - rank 0 decides what it means
            sums.problem.CopyFrom(said(error))
        sums.reduce, sums.model = number, self.model.name
        self._say(RankMessage(sums=sums))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Versions.

    def publish(self, order: RankPublish) -> None:
        """Keep the version at this place in the orders, for one reader."""
        if order.state:
            self._copy(int(order.version))
            return
        have = int(order.have_version) if order.HasField("have_version") else None
        self._publish((int(order.timeline), int(order.version), int(order.dtype), have))

    def read(self, order: RankRead) -> None:
        """Gather the rows that a call waits for, of the version at this place in the orders."""
        self.reads.read(order)

    def _publish(self, mark: Mark) -> None:
        """Encode the version that is the newest in the writer's queue now."""
        loop, publisher = asyncio.get_running_loop(), self.model.publisher
        timeline, _, dtype, have = mark
        wire, kept = dtypes.TORCH.get(dtype), self._mark(mark)
        job = self.model.writer.submit(lambda: publisher.this_version(timeline, have, wire, loop))
        job.add_done_callback(lambda done: self._keep(mark, kept, done))

    def _keep(
        self, mark: Mark, kept: asyncio.Future[Published], done: asyncio.Future[Published | None]
    ) -> None:
        error = done.exception()
        if error is not None:
            log.error("version %d of model %s was not encoded", mark[1], self.model.name, exc_info=error)
        published = None if error is not None else done.result()
        if published is None or published.version != mark[1]:
            _fail(kept, self._gone(mark[1]))
        elif not kept.done():
            kept.set_result(published)

    def _mark(self, mark: Mark) -> asyncio.Future[Published]:
        known = self._kept.get(mark)
        if known is None:
            loop = asyncio.get_running_loop()
            known = self._kept[mark] = loop.create_future()
            loop.call_later(KEEP_S, self._forget, mark, known)
        return known

    def _forget(self, mark: Mark, kept: asyncio.Future[Published]) -> None:
        if self._kept.get(mark) is kept:
            del self._kept[mark]
        _fail(kept, self._gone(mark[1]))

    def _gone(self, version: int) -> VersionGone:
        return VersionGone(version=version, model=self.model.name, rank=self.part.rank, retry_after_s=0.0)

    async def exactly(self, timeline: int, options: PullOptions) -> Published:
        """The version that rank 0 has answered a pull with. VersionGone if it is not kept, or does not come."""
        have = int(options.have_version) if options.HasField("have_version") else None
        version = int(options.version)
        mark = timeline, version, int(options.dtype), have
        if mark not in self._kept:
            if version < self.model.version:
                raise self._gone(version)
            if version == self.model.version:
                self._publish(mark)
        # one that is still to come is encoded when its ticket comes
        return await asyncio.shield(self._mark(mark))

    def _copy(self, version: int) -> asyncio.Future[ArenasCopy]:
        """A copy of everything at the version that is the newest in the writer's queue now. It is kept for one reader."""
        made = self._states[version] = asyncio.ensure_future(self.model.writer.submit(self.model.arenas.copy))
        made.add_done_callback(lambda done: done.cancelled() or done.exception())
        asyncio.get_running_loop().call_later(KEEP_S, self._states.pop, version, None)
        return made

    async def state(self, version: int) -> ArenasCopy:
        """Everything at the version that rank 0 has answered with. VersionGone if it is not kept, or has not come."""
        if version not in self._states and version != self.model.version:
            raise self._gone(version)
        made = self._states.pop(version, None) or self._copy(version)
        self._states.pop(version, None)
        return await asyncio.shield(made)

    def not_held(self, identity: Identity) -> NotHeld:
        """The error for a retry without its body of a part that is not here."""
        return NotHeld(worker=identity.worker, sequence=identity.sequence)

    def first_steps(self) -> Iterator[tuple[int, int]]:
        """The steps of the parameters that are the first of their groups and begin here, by group."""
        shard = self.model.shard
        firsts = (
            {} if shard is None else {slot.index: group for group, slot in shard.whole.first_of_group.items()}
        )
        for piece in self.part.pieces:
            if piece.is_first and piece.whole in firsts:
                yield firsts[piece.whole], self.model.arenas.steps[piece.index]

    def let_go(self) -> None:
        """The server stops: nobody waits any more."""
        self.reads.let_go()
        for part in self._held.values():
            _fail(part.done, self.not_held(part.identity))
            part.release()
        self._held.clear()


def _fail(awaited: asyncio.Future[Any], error: Exception) -> None:
    """Whoever awaits it gets the error, unless it is done. Perhaps nobody does any more, and that is no fault."""
    if not awaited.done():
        awaited.set_exception(error)
        awaited.exception()
