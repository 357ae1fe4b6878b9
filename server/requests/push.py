"""Takes one push from its header to its receipt, whichever door it came through.

`take` is the walk: the header is admitted, the body received and inspected, the complete push decided on by the
coordinator, and the executor's answer awaited. A retry of a push that the server holds already has no body.
"""

from __future__ import annotations

import copy

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import InternalError, InvalidRequest, PushstepError
from pushstep.proto.training_pb2 import PushCommit
from pushstep.proto.types_pb2 import Receipt

from ..arenas.publisher import Published
from ..coordinator.decision import Decision
from ..coordinator.push import PendingPush
from ..coordinator.receipts import fill_published
from ..models.catalog import Catalog
from ..models.model import Model
from ..parts.exact import ExactAnswer
from ..process.request_log import about
from ..shared_memory.answer import SharedAnswer
from ..shared_memory.regions import SharedMemory
from ..streams.bulk import BulkStream
from .pull import (
    exact_answer,
    exactly_stepped,
    newest,
    published_header,
    require_map,
    shared_answer,
    wire_of,
)
from .push_call import PushCall
from .receiving import Receiving, admit


class PushHandler:
    """Push and Exchange, from a stream of gRPC or the local socket."""

    def __init__(self, catalog: Catalog, memory: SharedMemory) -> None:
        self._catalog = catalog
        self._memory = memory

    async def push(self, stream: BulkStream[pb.PushRequest]) -> pb.PushResponse:
        """The receipt of one gradient."""
        with stream:
            _, receipt = await self._taken(stream)
        return pb.PushResponse(receipt=receipt)

    async def exchange(self, stream: BulkStream[pb.PushRequest]) -> tuple[Published, pb.PullHeader]:
        """A push, answered with a version of the parameters and the answer's header, which has the receipt."""
        with stream:
            call, receipt = await self._taken(stream, pulls=True)
        model, header = call.model, call.header
        begun_s = model.clock()
        if isinstance(call.answer, ExactAnswer):
            published, answer = await exactly_stepped(model, call.answer, header.manifest_hash)
        else:
            published = await newest(model, header.pull, call.identity.timeline, call.answer)
            answer = await published_header(model, published, header.manifest_hash)
        answer.groups.extend(receipt.groups)
        publish_s = model.clock() - begun_s
        model.counts.publish.observe(publish_s)
        fill_published(answer.receipt, receipt, publish_s)
        if published.shared and isinstance(call.answer, SharedAnswer):
            self._catalog.counts.shared_memory.sent_bytes += call.answer.nbytes
        return published, answer

    async def _taken(
        self, stream: BulkStream[pb.PushRequest], *, pulls: bool = False
    ) -> tuple[PushCall, Receipt]:
        self._catalog.require_open()
        header = (await stream.header()).header
        about(header.model, header.identity.worker, header.identity.sequence)
        if pulls:
            wire_of(header.pull.dtype)  # an answer that cannot be given is refused before the push is stepped
        model = self._catalog.get(header.model, header.identity.model_uid)
        require_map(model, header.map_version)
        call = PushCall(model, header, self._memory.of(header.identity, header.region))
        try:
            if pulls and model.shard is not None:
                call.answer = exact_answer(model, header.pull, header.identity.timeline)
            elif pulls:
                call.answer = shared_answer(model, self._memory, header.pull, header.identity)
            return call, await take(call, stream)
        except Exception as error:
            model.counts.refused(error.code if isinstance(error, PushstepError) else InternalError.code)
            raise
        finally:
            self._catalog.counts.shared_memory.received_bytes += call.region_bytes


async def take(call: PushCall, stream: BulkStream[pb.PushRequest]) -> Receipt:
    """One push, from its header to its receipt. Raises the error that it was refused with."""
    call.model.require_whole()
    if call.header.held_digest:
        call.model.coordinator.on_retry(call.header, call.started_s)
        return await answer(call)
    receiving = await admit(call)
    try:
        try:
            commit = await stream.feed(receiving.take)
        except InvalidRequest as error:
            call.fault(error)
            raise
        await hand_in(receiving, commit)
        return await answer(call)
    finally:
        receiving.release()


async def hand_in(receiving: Receiving, commit: PushCommit | None) -> None:
    """Hand a complete push to the coordinator, and have its decisions applied."""
    call, model = receiving.call, receiving.call.model
    try:
        pending = await receiving.finish(commit)
        decisions = await _judged(model, pending, commit)
    except InvalidRequest as error:
        # a cancelled stream also ends without a commit, and is no fault
        if commit is not None:
            call.fault(error)
        raise
    if pending.accepted:
        model.held.keep(pending, receiving.hand_over(), call.answer)
    model.executor.apply(decisions)


async def _judged(model: Model, pending: PendingPush, commit: PushCommit | None) -> list[Decision]:
    """What the coordinator decides about a complete push. Of a model in several ranks, once all have their parts."""
    leader = model.executor.leader
    if leader is not None and commit is not None:
        await leader.gather(pending, commit)
    try:
        model.require_whole()
        return model.coordinator.on_body(pending, model.clock())
    except PushstepError as error:
        if leader is not None:
            leader.refused(pending, error)
        raise


async def answer(call: PushCall) -> Receipt:
    """The receipt of a push that the server holds. Raises the error that it was refused with; PushPending."""
    decided = await call.model.held.answer(call.identity, call.hold_s)
    if decided.error is not None:
        raise copy.copy(decided.error)
    return decided.receipt
