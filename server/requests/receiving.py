"""The body of one push, from its admission to a complete `PendingPush`.

`admit` checks a header, waits if the policy says so, claims the body's bytes and makes a `Receiving`, which takes chunks
in and is finished at the end of the stream. Nothing is decided here. A stream that breaks off leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

import torch

from pushstep.optim.kernels.cache import ONLY_COMPILED, NotCompiled
from pushstep.proto.errors import DigestMismatch, InvalidRequest, MalformedFrame
from pushstep.proto.shared_memory.slots import SharedBody
from pushstep.proto.training_pb2 import PushCommit
from pushstep.proto.wire.dtypes import INT8
from pushstep.proto.wire.frames import Assembly, BodyDigest, Chunk
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import Part

from ..coordinator.decision import Offer
from ..coordinator.push import PendingPush
from ..devices.exported_memory import ExportedBody
from ..journal.journal import Journal
from ..parts.sums import known_blocks
from ..process.inline import INLINE_BYTES, INLINE_PARTS
from ..process.threads import DISK, PUSHES
from ..shared_memory.answer import SharedAnswer
from ..shared_memory.region import Region
from ..staging.budget import Budget
from ..staging.gradient import StagedPush, own_copy
from ..staging.incoming import IncomingBody
from ..staging.inspect import inspect
from .push_call import PushCall
from .push_header import Declared, close_header, declared, last_declared, require_plausible


def place_chunk(take_in: Callable[[Chunk], None], chunk: Chunk) -> asyncio.Future[None] | None:
    """Take in a chunk: at once (None), or in a thread. The caller awaits the future before the next one."""
    if len(chunk.payload) <= INLINE_BYTES:
        take_in(chunk)
        return None
    return PUSHES.start(take_in, chunk)


class Held:
    """What a push holds until it is resolved: bytes of the staging budget, and regions."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._regions: list[Region] = []
        self._journal: Journal | None = None
        self._record_bytes = 0
        self.reserved_bytes = 0

    def hold(self, *regions: Region | None) -> None:
        """Hold the regions that the gate and the step use. NoSharedMemory if one was closed."""
        for region in regions:
            if region is not None and region not in self._regions:
                region.require_memory()
                region.hold()
                self._regions.append(region)

    async def claim(self, owner: str, need_bytes: int) -> None:
        """Claim bytes of the budget. OverBudget."""
        self.reserved_bytes = await self._budget.claim(owner, need_bytes)

    async def promise_record(self, journal: Journal | None, need_bytes: int) -> None:
        """Have room in the journal for the push's record. JournalFull."""
        if journal is None:
            return
        if not journal.has_room(need_bytes):
            await DISK.run(journal.take_room, need_bytes)
        self._journal, self._record_bytes = journal, need_bytes

    def give_back(self) -> None:
        """Give everything back. Calling it twice does nothing."""
        if self._journal is not None:
            self._journal.give_back_room(self._record_bytes)
            self._journal = None
        self._budget.release(self.reserved_bytes)
        self.reserved_bytes = 0
        while self._regions:
            self._regions.pop().let_go()


async def admit(call: PushCall) -> Receiving:
    """Check the header, wait if the policy says so, and claim the body's bytes.

    A push that is refused here raises before any of its body is read. `Receiving.release` follows every success.
    """
    model, header, layout = call.model, call.header, call.model.layout
    require_plausible(layout, header.segments, header.edits)
    while call.judge.on_header(header, model.clock()) is Offer.WAIT:
        await model.held.change(call.until_s, call.worker)
    held = Held(model.staging)
    try:
        try:
            found = last_declared(layout, header, model.staging.total_bytes)
            if found is None:
                found = await _declared(call, layout)
        except InvalidRequest as error:
            call.fault(error)
            raise
        held.hold(call.region, call.answer.region if isinstance(call.answer, SharedAnswer) else None)
        await held.promise_record(model.recorder.journal, found.record_bytes)
        return await _received(call, layout, found, held)
    except BaseException:
        held.give_back()
        call.judge.on_stream_end(call.identity)
        raise


async def _declared(call: PushCall, layout: Layout) -> Declared:
    """What the header declares; computed in a thread if many parameters are involved."""
    header, model = call.header, call.model
    quantised = any(segment.dtype == INT8 for segment in header.segments[:INLINE_PARTS])
    parts = len(header.segments) + (len(layout.slots) if quantised else 0)
    limit_bytes = model.staging.total_bytes
    return await PUSHES.run_unless(parts <= INLINE_PARTS, declared, layout, header, model.name, limit_bytes)


async def _received(call: PushCall, layout: Layout, found: Declared, held: Held) -> Receiving:
    """What the body is received into, or where it lies; its bytes are claimed first."""
    model = call.model
    owner = f"{model.name}/{call.worker}"
    few = found.parameters <= INLINE_PARTS
    if call.region is not None:
        call.region_bytes = found.bytes_needed
        # what is recorded must be what is stepped, and the worker can write to its region at any time
        copy_bytes = found.bytes_needed if model.recorder.journal is not None else 0
        if found.segments_bytes + copy_bytes:
            await held.claim(owner, found.segments_bytes + copy_bytes)
        try:
            return await PUSHES.run_unless(few, _in_region, call, layout, call.region, found, held)
        except InvalidRequest as error:
            call.fault(error)
            raise
    await held.claim(owner, found.bytes_needed + found.segments_bytes)

    def allocated() -> Receiving:
        digest = BodyDigest(found.table)
        try:
            take = model.staging.buffer
            body = model.device.body(found.lengths, digest, take, stepped=found.is_plain)
            return Receiving(call, layout, found, held, body, digest)
        except torch.OutOfMemoryError as error:  # the device's
            raise model.staging.short(found.bytes_needed) from error

    return await model.device.prepared(allocated, small=few)


def _in_region(call: PushCall, layout: Layout, region: Region, found: Declared, held: Held) -> Receiving:
    return Receiving(call, layout, found, held, region.body(call.header, found.segments), None)


class Receiving:
    """One push whose body is being received. Owns what it holds until the executor takes that over."""

    def __init__(
        self,
        call: PushCall,
        layout: Layout,
        found: Declared,
        held: Held,
        body: Assembly | SharedBody,
        digest: BodyDigest | None,
    ) -> None:
        """`digest`: of a body that is sent, computed as it comes. None for one that lies in shared memory."""
        self.call = call
        self._layout = layout
        self._declared = found
        self._held = held
        self._body = body
        self._digest = digest
        few, small = found.parameters <= INLINE_PARTS, found.bytes_needed <= INLINE_BYTES
        self._is_small = few and small and call.model.arenas.device_stream.takes_small
        self._take = call.model.staging.buffer
        self._incoming: IncomingBody | None = None
        if not self._is_small and not isinstance(body, ExportedBody):
            self._incoming = IncomingBody(found.segments, found.blocks(), body, self._take)
        self._handed_over = False
        self._waited_s = call.model.clock() - call.started_s

    def take(self, chunk: Chunk) -> asyncio.Future[None] | None:
        """Copy a chunk into staging.

        Quarantined if the worker was quarantined meanwhile. MalformedFrame if the body lies in shared memory.
        """
        self.call.judge.on_chunk(self.call.identity, self.call.model.clock())
        if isinstance(self._body, SharedBody):
            raise MalformedFrame(problem="a push whose gradients lie in shared memory carries no chunks")
        body, incoming = self._body, self._incoming

        def take_in(chunk: Chunk) -> None:
            for part in body.parts_of(chunk):
                body.place(part)
                if incoming is not None:
                    incoming.advance(part.segment, part.offset + len(part.payload))

        return place_chunk(take_in, chunk)

    async def finish(self, commit: PushCommit | None) -> PendingPush:
        """The complete push. MalformedFrame, DigestMismatch; a body at fault is in the result."""
        call = self.call
        if isinstance(self._body, Assembly):
            self._body.finish()
        if commit is None:
            raise MalformedFrame(problem="the stream ended without a commit")
        close_header(self._layout, call.header, commit)
        receive_s = call.model.clock() - call.started_s - self._waited_s
        digest, push, fault = await self._look()
        if commit.digest not in (0, digest):
            raise DigestMismatch(got=digest, expected=commit.digest)
        pending = PendingPush(call.header, digest, receive_s=receive_s, waited_s=self._waited_s)
        pending.push, pending.fault = push, fault
        return pending

    def known_blocks(self, part: Part) -> dict[int, list[float]]:
        """The block sums of pieces that begin in an earlier rank, as far as they were taken while the body came in."""
        return known_blocks(self._incoming, self._declared.slots, part)

    def hand_over(self) -> Callable[[], None]:
        """Leave what the push holds to the caller; what gives it back."""
        self._handed_over = True
        return self._held.give_back

    def release(self) -> None:
        """End the stream. Gives back what was not handed over. Called once, however the push ended."""
        self.call.judge.on_stream_end(self.call.identity)
        if not self._handed_over:
            self._held.give_back()

    async def _look(self) -> tuple[int, StagedPush | None, InvalidRequest | None]:
        """The complete body's digest, the staged push (None for a skip), and the error of an invalid body."""
        if self._is_small:
            # the first push of a kind may have to compile kernels, which takes seconds: a thread does that
            try:
                with ONLY_COMPILED:
                    return self._read()
            except NotCompiled:
                pass
        reading = PUSHES.start(self._read)
        if self.call.region is None:
            return await reading
        # the thread goes on reading when the call was cancelled, so the memory must stay
        self.call.region.hold_until(reading)
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(reading)

    def _read(self) -> tuple[int, StagedPush | None, InvalidRequest | None]:
        model = self.call.model
        try:
            with model.device.reading(self._body):
                if isinstance(self._body, SharedBody):
                    digest = self._body.digest(None if self._incoming is None else self._incoming.advance)
                else:
                    digest = 0 if self._digest is None else self._digest.value
                return digest, *self._inspected()
        except torch.OutOfMemoryError as error:  # the device's
            raise model.staging.short(self._held.reserved_bytes) from error

    def _inspected(self) -> tuple[StagedPush | None, InvalidRequest | None]:
        header = self.call.header
        try:
            if header.skip:
                return None, None
            push = inspect(header, self._declared.slots, self._body, self._take, self._incoming)
            if self.call.region is not None and self.call.model.recorder.journal is not None:
                push = own_copy(push, self._take)
            return self.call.model.device.bring(push, self._body), None
        except InvalidRequest as error:
            return None, copy.copy(error)  # the traceback of the raised error keeps the whole body in memory
