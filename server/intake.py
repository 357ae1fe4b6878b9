"""A push's walk through the rooms: door -> session -> gate -> policy -> stepper -> publish.

The door makes an Intake from the first message, feeds it chunks, and commits it at the end of the stream. Nothing
is decided before the body is complete, and everything is decided in one stretch without awaiting, so two pushes
can never be decided in one order and stepped in another. A stream that breaks leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
from typing import TYPE_CHECKING

from pushstep.proto.errors import (
    DigestMismatch,
    InvalidRequest,
    MalformedFrame,
    OverBudget,
    PushstepError,
)
from pushstep.proto.frames import Assembly, BodyDigest, Chunk
from pushstep.proto.hyperparameters import Values, plain_values
from pushstep.proto.training_pb2 import PushCommit, PushHeader
from pushstep.proto.types_pb2 import Durability, Identity, Outcome, Receipt, ServerTimes, Ticket

from . import gate
from .hooks.hook import Point, StepContext
from .model import Model, refuse_consumed
from .session import Verdict, Worker
from .staging import INLINE_BYTES, Budget, StagedPush

if TYPE_CHECKING:
    from collections.abc import Mapping


def place(body: Assembly, chunk: Chunk) -> asyncio.Future[None] | None:
    """Copy a chunk into a body: at once, or in a thread, which the caller has to await before the next."""
    if len(chunk.payload) <= INLINE_BYTES:
        body.place(chunk)
        return None
    return asyncio.get_running_loop().run_in_executor(None, body.place, chunk)


class Pending:
    """Pushes that have been decided and not yet stepped, so that a retry can wait for its own."""

    def __init__(self) -> None:
        self._done: dict[tuple[bytes, int, str, int, int], asyncio.Event] = {}

    @staticmethod
    def _key(identity: Identity) -> tuple[bytes, int, str, int, int]:
        # workers of several models share names, epochs and sequences
        return identity.model_uid, identity.timeline, identity.worker, identity.epoch, identity.sequence

    def begin(self, identity: Identity) -> None:
        """Note that a push is on its way."""
        self._done[self._key(identity)] = asyncio.Event()

    def end(self, identity: Identity) -> None:
        """Wake whoever waits for it."""
        self._done.pop(self._key(identity)).set()

    async def wait(self, identity: Identity) -> None:
        """Return once the push is stepped; at once if it is not on its way."""
        event = self._done.get(self._key(identity))
        if event is not None:
            await event.wait()


class Intake:
    """One push, from its header to its receipt."""

    def __init__(self, model: Model, header: PushHeader, budget: Budget, pending: Pending) -> None:
        """Check the header and set its bytes aside, or raise before anything of the body is read."""
        self.model = model
        self.header = header
        self._budget = budget
        self._pending = pending
        self._started_s = time.monotonic()
        model.require_current(header.identity)
        self._layout = model.layout
        worker = model.sessions.require(header.identity, self._started_s)
        model.sessions.judged(worker, header.identity)
        lengths = gate.check_header(self._layout, header, model.name, budget.total_bytes)
        self._digest = BodyDigest(header.segments)
        self._reserved = sum(lengths)
        budget.reserve(self._reserved)
        try:
            self._body = Assembly(lengths, self._digest)
        except (MemoryError, RuntimeError) as error:  # torch's word for no memory
            budget.release(self._reserved)
            raise OverBudget(need=self._reserved, free="less", budget=budget.total_bytes) from error

    def place(self, chunk: Chunk) -> asyncio.Future[None] | None:
        """Copy a chunk into staging."""
        return place(self._body, chunk)

    def release(self) -> None:
        """Give the staging bytes back. Called once, however the push ended."""
        self._budget.release(self._reserved)

    async def commit(self, commit: PushCommit | None) -> Receipt:
        """Decide the push, step it, and return its receipt; raise what it was refused with."""
        self._body.finish()
        if commit is None:
            raise MalformedFrame(problem="the stream ended without a commit")
        gate.close_header(self.header, commit)
        digest = self._digest.value
        if commit.digest not in (0, digest):
            raise DigestMismatch(got=digest, expected=commit.digest)
        received_s = time.monotonic()
        fault: InvalidRequest | None = None
        push: StagedPush | None = None
        try:
            facts = self._layout, self.header, self._body, digest
            if self._reserved <= INLINE_BYTES:
                push = gate.inspect(*facts)
            else:
                push = await asyncio.to_thread(gate.inspect, *facts)
        except InvalidRequest as error:
            fault = error
        verdict, ticket = self._decide(push, fault, digest)
        if ticket is not None and push is not None:
            verdict.receipt.times.receive_s = received_s - self._started_s
            await self._step(ticket, push, verdict)
        else:
            await self._pending.wait(self.header.identity)
        if verdict.error is not None:
            raise copy.copy(verdict.error)
        return verdict.receipt

    def _decide(
        self, push: StagedPush | None, fault: InvalidRequest | None, digest: int
    ) -> tuple[Verdict, Ticket | None]:
        """The one synchronous stretch: identity, gate, edits, hooks, policy; then the sequence is consumed."""
        model, identity = self.model, self.header.identity
        model.require_current(identity)  # a restore may have come while the body was on its way
        worker = model.sessions.require(identity, time.monotonic())
        seen = model.sessions.judged(worker, identity, digest)
        if seen is not None:
            model.sessions.duplicate(worker, seen)
            return seen, None
        worker.base_version = self.header.base_version
        receipt = Receipt(identity=identity, version=model.version, lead=model.sessions.leads(worker))
        verdict, ticket = Verdict(digest, receipt), None
        try:
            if fault is not None or push is None:
                raise fault or MalformedFrame(problem="no body")
            if self.header.base_version > model.version:
                raise MalformedFrame(
                    problem=f"base_version {self.header.base_version} is ahead of version {model.version}"
                )
            if self.header.skip:
                receipt.outcome = Outcome.OUTCOME_SKIPPED
                receipt.reason = "skip_push"
            elif gate.decide(push, model.hooks.nonfinite(), model.groups):
                ticket = self._ticket(push, worker, receipt)
            else:
                receipt.outcome = Outcome.OUTCOME_SKIPPED
                receipt.reason = "nonfinite_gradient"
        except PushstepError as error:
            receipt.outcome = Outcome.OUTCOME_REJECTED
            receipt.reason = error.code
            # a copy: the one that was raised holds, in its traceback, the push's whole body
            verdict.error = refuse_consumed(copy.copy(error))
            model.record("push_rejected", worker.name, code=error.code)
        receipt.durability = Durability.DURABILITY_APPLIED
        if ticket is None:
            receipt.groups.extend(model.group_values())
        model.sessions.consume(worker, verdict)
        self._remember(worker)
        return verdict, ticket

    def _ticket(self, push: StagedPush, worker: Worker, receipt: Receipt) -> Ticket:
        """Apply the push's edits, run the hooks, and write the ticket of the next version."""
        model = self.model
        planned, ignored = model.groups.plan_worker_edits(self._edits(), receipt.lead, model.name)
        square_sums = {norm.parameter: norm.square_sum for norm in push.staged.norms}
        context = StepContext(
            worker=worker.name,
            base_version=self.header.base_version,
            version=model.version + 1,
            staleness=model.policy.staleness(push.staged, model.version),
            gradient_norm=math.sqrt(sum(square_sums[index] for index in sorted(square_sums))),
            square_sums=square_sums,
            metrics=dict(self.header.metrics),
        )
        model.hooks.step_pre(context)
        model.groups.write(planned)
        ticket = model.policy.ticket(push.staged, model.version, context.factor, model.group_values())
        model.version = ticket.version
        model.hooks.step_post(context, model.groups)
        worker.staleness = context.staleness
        receipt.outcome = Outcome.OUTCOME_APPLIED
        receipt.version = ticket.version
        receipt.staleness = context.staleness
        receipt.gradient_norm = context.gradient_norm
        receipt.clip_factor = context.factor
        receipt.ignored_edits.extend(ignored)
        receipt.groups.extend(model.groups.messages())
        for point in (Point.STEP_PRE, Point.STEP_POST):
            model.tell(
                point,
                worker=worker.name,
                staleness=context.staleness,
                gradient_norm=context.gradient_norm,
                factor=context.factor,
                metrics=dict(context.metrics),
            )
        return ticket

    async def _step(self, ticket: Ticket, push: StagedPush, verdict: Verdict) -> None:
        """Queue the ticket with the model's stepper and wait until its version is there."""
        model, identity = self.model, ticket.identity
        self._pending.begin(identity)
        queued_s = time.monotonic()
        times = ServerTimes()

        def execute() -> dict[int, float]:
            begun_s = time.monotonic()
            times.queue_s = begun_s - queued_s
            model.require_whole()
            model.arenas.step(ticket, push.parts)
            times.step_s = time.monotonic() - begun_s
            return model.arenas.applied_lrs(ticket)

        # The step is taken even if the caller goes away meanwhile: its retry will ask for the receipt.
        job = model.stepper.submit(execute, small=self._reserved <= INLINE_BYTES)
        stepping = asyncio.ensure_future(self._finish(job, ticket, verdict, times))
        await asyncio.shield(stepping)

    async def _finish(
        self, job: asyncio.Future[dict[int, float]], ticket: Ticket, verdict: Verdict, times: ServerTimes
    ) -> None:
        model = self.model
        try:
            lrs = await job
            for group in verdict.receipt.groups:
                group.effective_lr = lrs.get(group.group, group.effective_lr)
            times.receive_s = verdict.receipt.times.receive_s
            verdict.receipt.times.CopyFrom(times)
            model.last_receipt = verdict.receipt
        except Exception as error:  # noqa: BLE001 - a half-taken step must stop the model, whatever broke it
            if not isinstance(error, PushstepError) and model.failed is None:
                model.fail(error)
            verdict.error = error if isinstance(error, PushstepError) else model.failed
            verdict.receipt.outcome = Outcome.OUTCOME_REJECTED
            verdict.receipt.reason = verdict.error.code if verdict.error is not None else ""
        finally:
            self._pending.end(ticket.identity)

    def _edits(self) -> Mapping[int, Values]:
        return {edit.group: plain_values(edit.values) for edit in self.header.edits}

    def _remember(self, worker: Worker) -> None:
        worker.metrics = dict(self.header.metrics)
        if self.header.HasField("worker_state"):
            worker.worker_state = self.header.worker_state
