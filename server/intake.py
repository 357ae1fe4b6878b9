"""A push's walk through the rooms: door -> session -> gate -> policy -> stepper -> publish.

The door makes an Intake from the first message, has it admitted, feeds it chunks, and commits it at the end of the
stream. Nothing is decided here: the judge is asked at the header and when the body is complete, and what it decides
is carried out by the model's executor. A stream that breaks leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from pushstep.optim.kernel_cache import NotCompiled, only_compiled
from pushstep.proto.dtypes import INT8
from pushstep.proto.errors import DigestMismatch, InvalidRequest, MalformedFrame
from pushstep.proto.frames import Assembly, BodyDigest, Chunk
from pushstep.proto.region import SharedBody
from pushstep.proto.training_pb2 import PushCommit, PushHeader
from pushstep.proto.types_pb2 import Receipt

from . import gate
from .arrived import Arrived
from .candidate import Candidate
from .decision import Offer
from .executor import HOLD_S
from .exported_memory import ExportedBody
from .model import Model
from .region import Region
from .shared_answer import SharedAnswer
from .staging import INLINE_BYTES, StagedPush
from .threads import INLINE_PARTS, PUSHES
from .worker import Verdict


def place(take_in: Callable[[Chunk], None], chunk: Chunk) -> asyncio.Future[None] | None:
    """Have a chunk taken in: at once, or in a thread, which the caller has to await before the next."""
    if len(chunk.payload) <= INLINE_BYTES:
        take_in(chunk)
        return None
    return PUSHES.start(take_in, chunk)


class Intake:
    """One push, from its header to its receipt."""

    def __init__(
        self,
        model: Model,
        header: PushHeader,
        region: Region | None = None,
        answer: SharedAnswer | None = None,
    ) -> None:
        """`region`: where the gradients lie, if they are not sent. `answer`: what their step writes for the worker."""
        self.model = model
        self.header = header
        self._budget = model.staging
        self._region = region
        self._answer = answer
        self._held: list[Region] = []
        self._offered = self._handed_over = False
        self._arrived: Arrived | None = None
        self._reserved = 0
        self._waited_s = 0.0
        self._started_s = time.monotonic()
        self._hold_s = min(header.hold_s or HOLD_S, HOLD_S)

    @property
    def has_body(self) -> bool:
        """Whether a body follows; not of a retry of a push that is held here."""
        return not self.header.held_digest

    async def admit(self) -> None:
        """Check the header, wait if the policy says so, set the body's bytes aside; or raise, with nothing read."""
        model, header = self.model, self.header
        model.require_whole()
        self._layout = model.layout
        until_s = self._started_s + self._hold_s
        if not self.has_body:
            model.judge.reattached(header, self._started_s)
            return
        gate.require_plausible(self._layout, header.segments, header.edits)
        while model.judge.offered(header, time.monotonic()) is Offer.WAIT:
            await model.executor.change(until_s, header.identity.worker)
        self._offered = True
        with self._faulting():
            declared = await self._declared()
        few = declared.parameters <= INLINE_PARTS
        self._is_small = few and declared.bytes_needed <= INLINE_BYTES and model.arenas.lane.takes_small
        self._hold(self._region, None if self._answer is None else self._answer.region)
        owner = f"{model.name}/{header.identity.worker}"
        if self._region is not None:
            if declared.segments_bytes:
                self._reserved = await self._budget.claim(owner, declared.segments_bytes)
            self._body: Assembly | SharedBody
            with self._faulting():
                self._body, self._arrived = await PUSHES.run_unless(few, self._lying, self._region)
        else:
            self._reserved = await self._budget.claim(owner, declared.bytes_needed + declared.segments_bytes)
            receiving = partial(self._receiving, declared)
            self._body, self._arrived = await model.device.prepared(receiving, small=few)
        self._waited_s = time.monotonic() - self._started_s

    async def _declared(self) -> gate.Declared:
        """What the header declares, found out in a thread if that takes a look at many parameters."""
        header, layout = self.header, self._layout
        quantised = any(segment.dtype == INT8 for segment in header.segments[:INLINE_PARTS])
        parts = len(header.segments) + (len(layout.slots) if quantised else 0)
        limit_bytes = self._budget.total_bytes
        return await PUSHES.run_unless(
            parts <= INLINE_PARTS, gate.declared, layout, header, self.model.name, limit_bytes
        )

    def _lying(self, region: Region) -> tuple[SharedBody, Arrived | None]:
        body = region.body(self.header)
        return body, self._arriving(body)

    def _receiving(self, declared: gate.Declared) -> tuple[Assembly, Arrived | None]:
        self._digest = BodyDigest(self.header.segments)
        take, stepped = self._budget.buffer, declared.is_plain
        try:
            body = self.model.device.body(declared.lengths, self._digest, take, stepped=stepped)
        except torch.OutOfMemoryError as error:  # the device's
            raise self._budget.short(declared.bytes_needed) from error
        return body, self._arriving(body)

    def _arriving(self, body: Assembly | SharedBody) -> Arrived | None:
        if self._is_small or isinstance(body, ExportedBody):
            return None
        return Arrived(self._layout, self.header.segments, body, self._budget.buffer)

    def place(self, chunk: Chunk) -> asyncio.Future[None] | None:
        """Copy a chunk into staging. Quarantined, if its worker was meanwhile."""
        self.model.judge.require_open(self.header.identity)
        self.model.judge.moved(self.header.identity, time.monotonic())
        if isinstance(self._body, SharedBody):
            raise MalformedFrame(problem="a push whose gradients lie in shared memory carries no chunks")
        body, arrived = self._body, self._arrived

        def take_in(chunk: Chunk) -> None:
            body.place(chunk)
            if arrived is not None:
                arrived.advance(chunk.segment, chunk.offset + len(chunk.payload))

        return place(take_in, chunk)

    @contextmanager
    def _faulting(self) -> Iterator[None]:
        """A block in which a broken rule counts against the worker."""
        try:
            yield
        except InvalidRequest as error:
            self.fault(error)
            raise

    def fault(self, error: InvalidRequest) -> None:
        """Count a push that broke a rule before it was complete."""
        self.model.executor.carry_out(self.model.judge.faulted(self.header.identity, error, time.monotonic()))

    def release(self) -> None:
        """Give everything back that was not handed over. Called once, however the push ended."""
        if self._offered:
            self.model.judge.withdrawn(self.header.identity)
        if not self._handed_over:
            self._give_back()

    def _give_back(self) -> None:
        self._budget.release(self._reserved)
        self._reserved = 0
        while self._held:
            self._held.pop().let_go()

    def _hold(self, *regions: Region | None) -> None:
        """Keep what the gate and the step read and write until the push is settled."""
        for region in regions:
            if region is not None:
                region.require_memory()
                region.hold()
                self._held.append(region)

    async def commit(self, commit: PushCommit | None) -> Receipt:
        """Hand the push to the judge and return its receipt; raise what it was refused with."""
        if self.has_body:
            try:
                await self._hand_over(commit)
            except InvalidRequest as error:
                if commit is not None:  # without one it may have been cancelled, which ends a stream just so
                    self.fault(error)
                raise
        verdict = await self.model.executor.answer(self.header.identity, self._hold_s)
        return _receipt_or_raise(verdict)

    async def _hand_over(self, commit: PushCommit | None) -> None:
        if isinstance(self._body, Assembly):
            self._body.finish()
        if commit is None:
            raise MalformedFrame(problem="the stream ended without a commit")
        gate.close_header(self._layout, self.header, commit)
        received_s = time.monotonic()
        digest, push, fault = await self._look()
        if commit.digest not in (0, digest):
            raise DigestMismatch(got=digest, expected=commit.digest)
        candidate = Candidate(self.header, digest, receive_s=received_s - self._started_s - self._waited_s)
        candidate.waited_s = self._waited_s
        candidate.push, candidate.fault, candidate.answer = push, fault, self._answer
        if push is not None:
            push.staged.digest = digest
        model = self.model
        model.require_whole()
        decisions = model.judge.staged(candidate, time.monotonic())
        if candidate.taken:
            self._handed_over = True
            model.executor.keep(candidate, self._give_back)
        model.executor.carry_out(decisions)

    async def _look(self) -> tuple[int, StagedPush | None, InvalidRequest | None]:
        """The complete body's digest, and what the gate finds in it or refuses it with."""
        if self._is_small:
            # of a kind that is new here the kernels may have to be compiled, for seconds
            with contextlib.suppress(NotCompiled), only_compiled():
                return self._read()
        reading = PUSHES.start(self._read)
        if self._region is None:
            return await reading
        # the thread reads on when the call has ended, and the memory has to be there
        self._region.hold_until(reading)
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(reading)

    def _read(self) -> tuple[int, StagedPush | None, InvalidRequest | None]:
        try:
            with self.model.device.reading(self._body):
                if isinstance(self._body, Assembly):  # its digest was taken as it came
                    digest = self._digest.value
                else:
                    digest = self._body.digest(None if self._arrived is None else self._arrived.advance)
                return digest, *self._inspected()
        except torch.OutOfMemoryError as error:  # the device's
            raise self._budget.short(self._reserved) from error

    def _inspected(self) -> tuple[StagedPush | None, InvalidRequest | None]:
        try:
            if self.header.skip:
                return None, None
            push = gate.inspect(self._layout, self.header, self._body, self._budget.buffer, self._arrived)
            return self.model.device.bring(push, self._body), None
        except InvalidRequest as error:
            return None, copy.copy(error)  # the one that was raised holds, in its traceback, the whole body


def _receipt_or_raise(verdict: Verdict) -> Receipt:
    if verdict.error is not None:
        raise copy.copy(verdict.error)
    return verdict.receipt
