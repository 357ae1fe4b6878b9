"""What the witness sees of a server process: each event that its coordinator is told of, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pushstep.proto.errors import PushPending
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity, Receipt, Ticket
from pushstep.server.arenas.arenas_copy import ArenasCopy
from pushstep.server.coordinator.decision import Decision, Offer, Resolve, Step
from pushstep.server.coordinator.worker import Worker
from pushstep.server.models.model import Model
from pushstep.server.storage.saved_state import SavedState

from .disk import Facts
from .witness import Violation, Witness

if TYPE_CHECKING:
    from .server import Server


def watch(server: Server, model: Model, witness: Witness) -> None:
    """From here on, until the process is over."""
    coordinator, executor = model.coordinator, model.executor
    on_header, join, on_leave = coordinator.on_header, coordinator.join, coordinator.on_leave
    receipts_of, apply, finish = coordinator.receipts_of, executor.apply, executor._finish
    arenas, held, dump, restore = model.arenas, model.held, model.dump, model.restore
    step, resolve_push, change = arenas.step, held.resolve, held.change

    def offered(header: PushHeader, now_s: float) -> Offer:
        offer = on_header(header, now_s)
        if not server.is_over:
            witness.offered(header, offer)
        return offer

    def joined(
        name: str, now_s: float, takeover: bool, attempt: int = 0, old_epoch: int = 0
    ) -> tuple[Worker, list[Decision]]:
        worker, decisions = join(name, now_s, takeover, attempt, old_epoch)
        witness.joined(worker, attempt, old_epoch)
        return worker, decisions

    def reminded(worker: Worker) -> list[Receipt]:
        receipts = receipts_of(worker)
        witness.reminded(worker, receipts)
        return receipts

    def leaves(
        identity: Identity, now_s: float, edits: Mapping[int, Any] | None = None, state: bytes | None = None
    ) -> tuple[list[str], list[Decision]]:
        if edits:
            witness.leaves(identity, edits[0]["lr"])
        return on_leave(identity, now_s, edits, state)

    def decided(decisions: Sequence[Decision]) -> None:
        # what is decided behind the end of a model is void: nobody does it, keeps it or is told
        if not (server.is_over or model.ended):
            witness.decided(decisions)
        apply(decisions)

    def stepped(ticket: Ticket, *rest: Any) -> set[int]:
        if not server.is_over:
            try:
                witness.steps(ticket.version, arenas)
            except Violation as violation:  # raised here, it would only make the step fail
                server.loop.fail(violation)
        return step(ticket, *rest)

    def resolved(resolve: Resolve) -> None:
        if not server.is_over:
            witness.resolved(resolve, arenas)
        resolve_push(resolve)

    async def changed(until_s: float, worker: str) -> None:
        since_s = server.loop.now_s
        try:
            await change(until_s, worker)
        except PushPending:
            if not server.is_over:
                witness.gave_up(worker, since_s)
            raise

    def finished(job: asyncio.Future[Any], step: Step, *rest: Any) -> None:
        if job.exception() is not None and not server.is_over:
            witness.undone(step, model.arenas)
        finish(job, step, *rest)

    def dumped() -> dict[str, Any]:
        facts = Facts(dump())
        facts.books = witness.books.copy()
        return facts

    def restored(copy: ArenasCopy, saved: SavedState | None, timeline: int, by: str) -> Any:
        assert saved is not None
        if not server.is_over:
            witness.goes_back(server.disk.books[saved.snapshot], timeline)
        return restore(copy, saved, timeline, by)

    coordinator.on_header, coordinator.join, coordinator.on_leave = offered, joined, leaves
    coordinator.receipts_of, executor.apply, executor._finish = reminded, decided, finished
    arenas.step, held.resolve, held.change = stepped, resolved, changed
    model.dump, model.restore = dumped, restored
    witness.attend(coordinator)
