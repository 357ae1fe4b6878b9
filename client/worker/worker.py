"""One worker of one model, in the protocol's terms: slots, tensors and messages.

A push without an answer is sent again, unchanged, until it is answered; the server applies it once. After a restore
the worker joins again by itself, learns whether the restored version holds the step, and continues from there.
`Session` adds what a user holds: names, arrays, an optimizer and `close`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    Fenced,
    LeaseExpired,
    ManifestChanged,
    MapChanged,
    ModelLost,
    PushstepError,
    Superseded,
    UnknownModel,
    UnknownWorker,
)
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import group_edits
from pushstep.proto.wire.layout import Layout, Slot

from ..gradients.body import PushBodies, Rows
from ..gradients.compression import Compression, push_and_pull
from ..membership.member import Member
from ..membership.membership import Membership
from ..membership.receipt import Outcome, Receipt, own_receipt
from ..shards.sending import ShardedSending
from ..shards.transport import ShardedTransport
from ..shared_memory.local_socket import LocalSocket
from ..shared_memory.sharing import SharedMemory
from ..transport.attempts import Attempts, Sending
from ..transport.shield import shield
from ..transport.streams import Body, Pulled
from .cache import ParameterCache
from .early_push import EarlyPush
from .flight import Flight, Flights
from .options import WorkerOptions
from .outcomes import Outcomes
from .ranks import Ranks
from .row_cache import Finish
from .rows_asked import RowsAsked

# How long the server may hold a waiting push before it answers `push_pending`. The log reports a wait after 2 s
# (waiting.SAY_AFTER_S), and needs the reason by then.
HOLD_S: Final = 1.5
Step = tuple[Receipt, Pulled | None]


class Worker:
    """Makes the pushes of a membership, one after the other. Several threads must not use it at once."""

    def __init__(self, transport: ShardedTransport, options: WorkerOptions) -> None:
        push_wire, self._pull_wire = push_and_pull(options.wire)
        self.compression = Compression(push_wire, options.top_k)
        self._flights = Flights()
        self.membership = Membership(
            transport,
            options.model,
            options.worker,
            self.compression,
            options.retry_for_s,
            options.takeover,
            before_use=self._flights.wait,
        )
        self.memory = SharedMemory(
            transport,
            options.model,
            (push_wire, self._pull_wire),
            # a region has no place for compressed pushes: they travel as frames
            wanted=options.shared_memory and not self.compression.owes,
        )
        # a session that was dropped without close() leaves, too
        weakref.finalize(self, self.membership.heartbeat.abandon, self.memory.abandon).atexit = False
        self._transport = transport
        self.spans = transport.spans
        self._bodies = PushBodies(self.compression)
        # looks for a DistributedDataParallel wrapper around what is attached
        self.ranks = Ranks(())
        # tasks to run before the session leaves
        self._before_close: list[Callable[[], None]] = []
        self.cache = ParameterCache()
        self._outcomes = Outcomes(
            self.membership, self.cache, self._flights, options.on_reject, options.on_restore
        )

    @property
    def model(self) -> str:
        """The model's name."""
        return self.membership.model

    def member(self) -> Member:
        """The membership; see `Membership.member`."""
        return self.membership.member()

    # The thread of `prefetch`, and the end.

    def wait_for_flight(self) -> None:
        """Wait until no push is in flight."""
        self.membership.check_usable()

    def fly(self, call: Callable[[], Step]) -> Flight[Step]:
        """Run `call`, which makes a step, in its own thread; other calls on the session wait for it."""
        self.membership.check_usable()
        return self._flights.start(self.spans.here(call))

    def before_close(self, task: Callable[[], None]) -> None:
        """Run `task` when the session is closed, before it leaves, while the connection is still open."""
        self._before_close.append(task)

    def not_before_close(self, task: Callable[[], None]) -> None:
        """Undo `before_close(task)`."""
        self._before_close.remove(task)

    def run_before_close(self) -> None:
        """Run the tasks of `before_close`."""
        for task in self._before_close:
            task()

    def hurry(self, seconds: float) -> bool:
        """Limit each call, and the push in flight, to `seconds`. Returns whether no push is in flight afterwards."""
        self.membership.retry.give_up()
        self._transport.hurry(seconds)
        return self._flights.land_within(seconds)

    def end(self) -> None:
        """End the membership here and close the connection."""
        self.membership.closed = True
        self.memory.drop()
        self._transport.close()
        self.membership.heartbeat.wait(timeout_s=1)

    # The step.

    def commit(
        self,
        metrics: Mapping[str, float] | None = None,
        edits: Mapping[int, Mapping[str, float | bool]] | None = None,
        samples: float = 0,
    ) -> pb.PushCommit:
        """The next push's commit: metrics, samples, edits by group, and the worker state if it is due."""
        return pb.PushCommit(
            metrics=metrics or None,
            samples=samples,
            worker_state=self.membership.worker_state.due(),
            edits=group_edits(edits) if edits else None,
        )

    def step(
        self,
        gradients: Mapping[Slot, Tensor | Rows],
        held: tuple[int, int] | None,
        commit: pb.PushCommit,
        *,
        skip: bool = False,
        pull: bool,
        early: EarlyPush | None = None,
        onto: tuple[int, int] | None = None,
    ) -> Step:
        """Push under the next sequence until the server answers. Returns the receipt and what was pulled.

        `held` is the (timeline, version) that the gradients were computed on; None means the version of the join. With
        `skip` there are no gradients, on purpose: the push only says that this worker takes part. With `pull` the push
        is an exchange: its answer has what has changed since `onto`, or since `held` if `onto` is None. `early` is the same
        exchange, sent except for its commit. A restore in between gives the outcome `superseded` and no parameters: the session
        has joined again, and the caller has to forget what it holds and pull.
        """
        spans = self.spans
        name = "exchange" if pull else "push"
        with spans.span(name, model=self.model, worker=self.membership.worker) as span:
            made = self._step(gradients, held, commit, skip=skip, pull=pull, early=early, onto=onto)
            if span is not None:
                told = made[0]
                spans.note(span, outcome=str(told.outcome), sequence=told.sequence, version=told.version)
            return made

    def _step(
        self,
        gradients: Mapping[Slot, Tensor | Rows],
        held: tuple[int, int] | None,
        commit: pb.PushCommit,
        *,
        skip: bool,
        pull: bool,
        early: EarlyPush | None,
        onto: tuple[int, int] | None,
    ) -> Step:
        membership = self.membership
        member = membership.member()
        while True:
            known = membership.known_timeline
            if known != member.timeline or (held is not None and held[0] < member.timeline):
                # The session has joined again after a restore that the caller does not know of yet, or the caller
                # holds values from before it. If `held` is later than the membership, since a pull has brought the restored
                # values, this does not apply: the push is sent, and the server answers it with Superseded.
                push = member.next_identity()
                push.timeline = held[0] if held is not None and held[0] < member.timeline else known
                return self._outcomes.resolved(
                    own_receipt(Outcome.SUPERSEDED, "superseded", push, member.version)
                ), None
            options = self._pull_options(onto or held) if pull else None
            header = self._push_header(member, held, options, skip=skip)
            if early is not None and not early.is_as(header):
                early.withdraw()
                early = None
            self.compression.begin()
            if skip:
                body = Body((), ())
            else:
                body = self._bodies.of(member.layout, gradients) if early is None else early.body
            sending: Attempts[Step]
            if self._transport.shards is None:
                header.segments.extend(body.segments)
                if early is None:
                    self.memory.place(member, header, body, gradients)
                begun = None if early is None else partial(_finished, early)
                send = self._exchange if pull else self._push
                sending = Sending(send, header, body, commit, member.layout, begun)
            else:
                sending = ShardedSending(self._transport, header, body, commit, member.layout)
            try:
                receipt, pulled = membership.retry.run(sending)
            except (Superseded, LeaseExpired, ManifestChanged, MapChanged, UnknownWorker) as error:
                try:
                    settled = membership.find_out(header.identity, in_doubt=sending.in_doubt)
                except Fenced as fenced:
                    return self._outcomes.refused(fenced, header.identity, in_doubt=sending.in_doubt), None
                if settled is not None:
                    return self._outcomes.resolved(settled), None
                member = membership.member()
                if isinstance(error, ManifestChanged):
                    # a group was added: the layout is another, so look the slots up by name
                    gradients = {
                        member.layout.slot(s.name, membership.model): g for s, g in gradients.items()
                    }
                early = None
                continue
            except PushstepError as error:
                return self._outcomes.refused(error, header.identity, in_doubt=sending.in_doubt), None
            except BaseException:
                membership.in_doubt = header.identity  # interrupted: it may have arrived
                raise
            member.sequence = header.identity.sequence
            member.lead = receipt.lead
            membership.worker_state.arrived(commit.worker_state)
            if receipt.missing_metrics:
                self._outcomes.warn_of_metrics(receipt)
            return membership.note(receipt), pulled

    def begin_push(
        self, held: tuple[int, int] | None, layout: Layout, segments: Sequence[Segment]
    ) -> EarlyPush | None:
        """Open the stream of the next step's expected exchange; None if that is not possible now."""
        membership = self.membership
        member = membership.current
        if membership.is_over or member is None or membership.in_doubt is not None:
            return None
        if self.memory.region is not None:  # nothing has to be sent: the gradients lie in shared memory
            return None
        if self._transport.shards is not None:
            return None
        if member.layout is not layout or held is None or held[0] != member.timeline:
            return None
        header = self._push_header(member, held, self._pull_options(held))
        header.segments.extend(segments)
        return EarlyPush(self._transport, header, layout)

    def _push_header(
        self,
        member: Member,
        held: tuple[int, int] | None,
        pull: pb.PullOptions | None,
        *,
        skip: bool = False,
    ) -> pb.PushHeader:
        """The next push's header, without segments: its identity, base version and manifest hash."""
        return pb.PushHeader(
            model=self.model,
            identity=member.next_identity(),
            base_version=held[1] if held is not None else member.version,
            manifest_hash=member.layout.manifest_hash,
            skip=skip,
            hold_s=min(self._transport.timeout_s / 3, HOLD_S),
            pull=pull,
        )

    def _push(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, _: Layout) -> Step:
        answer: pb.PushResponse | pb.PullHeader | None
        answer = self.memory.attempt(LocalSocket.push, header, commit)
        receipt = self._transport.push(header, body, commit) if answer is None else answer.receipt
        return Receipt.of(receipt), None

    def _exchange(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, layout: Layout) -> Step:
        region = self.memory.region
        answer = self.memory.attempt(LocalSocket.exchange, header, commit)
        if answer is not None and region is not None:
            pulled = region.answer_of(answer)
        else:
            pulled = self._transport.exchange(header, body, commit, layout)
        return Receipt.of(pulled.header.receipt), pulled

    # Pulling.

    def pull_message(self, have: tuple[int, int] | None) -> Pulled:
        """The newest version as received, for a worker that holds `have` (timeline, version)."""
        member = self.member()
        request = pb.PullRequest(
            model=self.model,
            identity=member.identity(),
            options=self._pull_options(have),
            timeline=have[0] if have else 0,
            manifest_hash=member.layout.manifest_hash,
        )

        def pull() -> Pulled:
            return self._transport.pull(request, member.layout)

        try:
            return self._read(pull)
        except (Superseded, LeaseExpired, UnknownWorker):
            # the next step joins again and tells the caller of a restore: until then, pull as a reader without identity
            request.ClearField("identity")
            return self._read(pull)

    def pull_into_cache(self) -> None:
        """Bring the cache to the newest version, as a reader without identity."""
        have, layout = self.cache.at, self.cache.layout
        request = pb.PullRequest(
            model=self.model,
            options=self._pull_options(have),
            timeline=have[0] if have else 0,
            manifest_hash=layout.manifest_hash if layout is not None else 0,
        )
        self.cache.take(self._read(lambda: self._transport.pull(request, layout)))

    def pull_rows(self, asked: RowsAsked, layout: Layout) -> tuple[tuple[int, int], dict[Slot, Tensor]]:
        """The (timeline, version) of rows, and the rows of each parameter in the order of its ids."""
        request = asked.request(self.model, dtypes.to_wire_or_own(self._pull_wire, "wire"))
        return asked.answer(self._read(lambda: self._transport.pull_rows(request, layout)))

    def begin_rows(self, asked: RowsAsked, layout: Layout) -> Finish:
        """Ask for rows, and return at once; call the result to wait for them. grpc.RpcError, TransportFailure."""
        request = asked.request(self.model, dtypes.to_wire_or_own(self._pull_wire, "wire"))
        finish = self._transport.begin_rows(request, layout)
        return lambda: asked.answer(finish())

    @shield
    def pull_state(self) -> Pulled:
        """Parameters, optimizer state and step counts at one version."""
        self.membership.check_usable()
        return self._read(lambda: self._transport.pull_state(pb.PullStateRequest(model=self.model)))

    def _read(self, pull: Callable[[], Pulled]) -> Pulled:
        """Pull until the server answers. ModelLost if the model that this session knows is gone."""
        try:
            with self.spans.span("pull", model=self.model, worker=self.membership.worker):
                pulled = self.membership.retry.run(pull)
        except UnknownModel as error:
            if not self.membership.uid:
                raise
            raise ModelLost(model=self.model) from error
        self.membership.know(pulled.header.model_uid)
        return pulled

    def _pull_options(self, have: tuple[int, int] | None) -> pb.PullOptions:
        """The options of a pull for a worker that holds `have` (timeline, version)."""
        options = pb.PullOptions(dtype=dtypes.to_wire_or_own(self._pull_wire, "wire"), joined_chunks=True)
        if have is not None:
            options.have_version = have[1]
        return options


def _finished(early: EarlyPush, commit: pb.PushCommit) -> Step:
    pulled = early.finish(commit)
    return Receipt.of(pulled.header.receipt), pulled
