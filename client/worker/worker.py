"""One worker of one model, in the protocol's terms: slots, tensors and messages.

A push without an answer is sent again, unchanged, until it is answered; the server applies it once. After a restore
the worker joins again by itself, learns whether the restored version holds the step, and continues from there.
`Session` adds what a user holds: names, arrays, an optimizer and `close`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    CATALOGUE,
    Conflict,
    FateUnknown,
    Fenced,
    LeaseExpired,
    ManifestChanged,
    ModelLost,
    NoAnswer,
    PushstepError,
    Quarantined,
    Superseded,
    UnknownModel,
    UnknownWorker,
)
from pushstep.proto.types_pb2 import Identity, Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout, Slot

from ..gradients.body import Rows, push_body
from ..gradients.compression import Compression, Wire, push_and_pull
from ..membership.member import Member
from ..membership.membership import Membership, edit_messages, own_receipt
from ..membership.receipt import Outcome, Receipt
from ..shared_memory.sharing import SharedMemory
from ..transport.attempts import Sending
from ..transport.channel import Transport
from ..transport.early_push import EarlyPush
from ..transport.shield import shield
from ..transport.streams import Body, Pulled
from ..warn import warn
from .cache import ParameterCache
from .flight import Flight
from .ranks import Ranks

# How long the server may hold a waiting push before it answers `push_pending`. The log reports a wait after 2 s
# (waiting.SAY_AFTER_S), and needs the reason by then.
HOLD_S: Final = 1.5
Step = tuple[Receipt, Pulled | None]


class Worker(Membership):
    """Makes the pushes of a membership, one after the other. Several threads must not use it at once."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        worker: str,
        wire: Wire,
        top_k: float | None,
        retry_for_s: float,
        takeover: bool,
        on_reject: str,
        on_restore: str,
        *,
        shared_memory: bool = False,
    ) -> None:
        push_wire, self.pull_wire = push_and_pull(wire)
        super().__init__(
            transport,
            model,
            worker,
            Compression(push_wire, top_k),
            retry_for_s=retry_for_s,
            takeover=takeover,
        )
        self.memory = SharedMemory(
            transport,
            model,
            (push_wire, self.pull_wire),
            # a region has no place for compressed pushes: they travel as frames
            wanted=shared_memory and not self.compression.owes,
        )
        # a session that was dropped without close() leaves, too
        weakref.finalize(self, self._heartbeat.abandon, self.memory.abandon).atexit = False
        self._on_reject = on_reject
        self._on_restore = on_restore
        self._flight: Flight[Step] | None = None
        # of what is attached: the checks of torch.distributed's ranks, and the tasks to run before the end
        self.ranks = Ranks(())
        self._before_close: list[Callable[[], None]] = []
        self._told_of_metrics = False
        # here and not in Session: a step finds that the model was restored, and the cache is then worthless
        self._cache = ParameterCache()

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._flight is not None and not self._flight.is_mine():
            self._flight.wait()

    def wait_for_flight(self) -> None:
        """Wait until no push is in flight."""
        self._check_usable()

    def _lands_within(self, seconds: float) -> bool:
        """Wait up to `seconds` for the push in flight; whether none is in flight then."""
        return self._flight is None or self._flight.wait(seconds)

    def fly(self, call: Callable[[], Step]) -> Flight[Step]:
        """Run `call`, which makes a step, in its own thread; other calls on the session wait for it."""
        self._check_usable()
        self._flight = Flight(call)
        self._flight.start()
        return self._flight

    def before_close(self, task: Callable[[], None]) -> None:
        """Run `task` when the session is closed, before it leaves, while the connection is still open."""
        self._before_close.append(task)

    def not_before_close(self, task: Callable[[], None]) -> None:
        """Undo `before_close(task)`."""
        self._before_close.remove(task)

    # The step.

    def commit(
        self,
        metrics: Mapping[str, float] | None = None,
        edits: Mapping[int, Mapping[str, float | bool]] | None = None,
        samples: float = 0,
    ) -> pb.PushCommit:
        """The next push's commit: metrics, samples, edits by group, and the worker state if it is due."""
        return pb.PushCommit(
            metrics=metrics or {},
            samples=samples,
            worker_state=self._worker_state if self._worker_state_due else None,
            edits=edit_messages(edits or {}),
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
        """Push under the next sequence, sent until it is answered; the receipt and what was pulled.

        `held` is the (timeline, version) that the gradients were computed on; None means the version of the join. With
        `skip` there are no gradients, on purpose: the push only says that this worker takes part. With `pull` the push
        is an exchange: its answer is relative to `onto`, or to `held` if `onto` is None. `early` is the same exchange,
        sent except for its commit. A restore in between gives the outcome `superseded` and no parameters: the session
        has joined again, and the caller has to forget what it holds and pull.
        """
        member = self.member()
        while True:
            if self._heard != member.timeline or (held is not None and held[0] < member.timeline):
                # The session has joined again after a restore that the caller does not know of yet, or the caller
                # holds values from before it. If `held` is later than the membership, a pull has brought the restored
                # values, and the server answers this push with Superseded.
                push = member.next_identity()
                push.timeline = held[0] if held is not None and held[0] < member.timeline else self._heard
                return self._told(own_receipt(Outcome.SUPERSEDED, "superseded", push, member.version)), None
            header = self._push_header(member, held, skip)
            if pull:
                header.pull.CopyFrom(self._pull_options(onto or held))
            if early is not None and not early.is_as(header):
                early.withdraw()
                early = None
            self.compression.begin()
            if skip:
                body = Body((), ())
            else:
                body = push_body(member.layout, gradients, self.compression) if early is None else early.body
            header.segments.extend(body.segments)
            if early is None:
                self.memory.place(member, header, body, gradients)
            sending = self._sending(header, body, commit, member.layout, early)
            try:
                receipt, pulled = self._retry.run(sending)
            except (Superseded, LeaseExpired, ManifestChanged, UnknownWorker) as error:
                try:
                    settled = self.find_out(header.identity, in_doubt=sending.in_doubt)
                except Fenced as fenced:
                    return self._refused(fenced, header.identity, in_doubt=sending.in_doubt), None
                if settled is not None:
                    return self._told(settled), None
                member = self.member()
                if isinstance(error, ManifestChanged):
                    # a group was added: the layout is another, so look the slots up by name
                    gradients = {member.layout.slot(s.name, self.model): g for s, g in gradients.items()}
                early = None
                continue
            except PushstepError as error:
                return self._refused(error, header.identity, in_doubt=sending.in_doubt), None
            except BaseException:
                self._in_doubt = header.identity  # interrupted: it may have arrived
                raise
            member.sequence = header.identity.sequence
            member.lead = receipt.lead
            if commit.worker_state == (self._worker_state or b""):
                self._worker_state_due = False
            self._warn_of_metrics(receipt)
            return self.note(receipt), pulled

    def begin_push(
        self, held: tuple[int, int] | None, layout: Layout, segments: Sequence[Segment]
    ) -> EarlyPush | None:
        """Open the stream of the next step's expected exchange; None if that is not possible now."""
        member = self._member
        if self._closed or os.getpid() != self._pid or member is None or self._in_doubt is not None:
            return None
        if self.memory.region is not None:  # nothing has to be sent: the gradients lie in shared memory
            return None
        if member.layout is not layout or held is None or held[0] != member.timeline:
            return None
        header = self._push_header(member, held)
        header.pull.CopyFrom(self._pull_options(held))
        header.segments.extend(segments)
        return EarlyPush(self._transport, header, layout)

    def _push_header(self, member: Member, held: tuple[int, int] | None, skip: bool = False) -> pb.PushHeader:
        """The next push's header, without segments: its identity, base version and manifest hash."""
        return pb.PushHeader(
            model=self.model,
            identity=member.next_identity(),
            base_version=held[1] if held is not None else member.version,
            manifest_hash=member.layout.manifest_hash,
            skip=skip,
            hold_s=min(self._transport.timeout_s / 3, HOLD_S),
        )

    def _sending(
        self,
        header: pb.PushHeader,
        body: Body,
        commit: pb.PushCommit,
        layout: Layout,
        early: EarlyPush | None,
    ) -> Sending[Step]:
        if not header.HasField("pull"):
            return Sending(partial(self._push, commit=commit), header, body)
        begun = None if early is None else lambda: _exchanged(early.finish(commit))
        return Sending(partial(self._exchange, commit=commit, layout=layout), header, body, begun)

    def _push(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit) -> Step:
        shared = self.memory.attempt(header, lambda local_socket: local_socket.push(header, commit))
        answer = shared if shared is not None else self._transport.push(header, body, commit)
        return Receipt.of(answer.receipt), None

    def _exchange(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, layout: Layout) -> Step:
        region = self.memory.region
        shared = self.memory.attempt(header, lambda local_socket: local_socket.exchange(header, commit))
        if shared is not None and region is not None:
            return _exchanged(region.answer_of(shared))
        return _exchanged(self._transport.exchange(header, body, commit, layout))

    def _refused(self, error: PushstepError, push: Identity, *, in_doubt: bool) -> Receipt:
        """The receipt of a push that was answered with an error, if it has one; otherwise raise the error.

        NoAnswer leaves the push in doubt. FateUnknown if a fenced session cannot find out what became of it.
        """
        if isinstance(error, NoAnswer):
            self._in_doubt = push
            raise error
        if in_doubt and isinstance(error, Fenced):
            # a fenced session may not join again to find out
            self._in_doubt = None
            self.compression.settle(applied=False)
            raise FateUnknown(sequence=push.sequence, worker=self.worker) from error
        final = error.consumed or isinstance(error, (Conflict, Fenced))
        if in_doubt and not final:
            # this attempt was refused, but an earlier one without an answer may have been applied
            settled = self.find_out(push)
            if settled is not None:
                return self._told(settled)
        elif error.consumed or isinstance(error, Conflict):
            self.member().sequence = push.sequence
        if final or isinstance(error, Quarantined):
            receipt = own_receipt(Outcome.REJECTED, error.code, push, self.member().version)
            return self._rejected(error, self.note(receipt))
        raise error

    def _rejected(self, error: PushstepError, receipt: Receipt) -> Receipt:
        if self._on_reject == "raise":
            raise error
        self._warn(f"push rejected: {error.message}")
        return receipt

    def _told(self, receipt: Receipt) -> Receipt:
        """Note the receipt of a push that a new join has resolved, or that came after a restore; return it.

        Raises the error that the push was rejected with (on_reject="raise"), and Superseded after a restore that the
        caller does not know of yet (on_restore="raise"); otherwise warns.
        """
        member = self.member()
        self.note(receipt)
        if receipt.timeline != member.timeline:
            self._cache.forget()
        if self.tell_restore():
            if self._on_restore == "raise":
                raise Superseded(model=self.model, timeline=member.timeline, got=receipt.timeline)
            became = "not applied" if receipt.outcome is Outcome.SUPERSEDED else f"{receipt.outcome} before"
            self._warn(
                f"model {self.model!r} was restored to version {member.version} (timeline {member.timeline}); this step "
                f"was {became}, going on from there"
            )
        if receipt.outcome is Outcome.REJECTED:
            message = f"push {receipt.sequence} of epoch {receipt.epoch} was rejected: {receipt.reason}"
            return self._rejected(CATALOGUE[receipt.reason](message, consumed=True), receipt)
        return receipt

    def _warn_of_metrics(self, receipt: Receipt) -> None:
        """Warn once that a hook waits for metrics that no push has reported."""
        if receipt.missing_metrics and not self._told_of_metrics:
            self._told_of_metrics = True
            names = ", ".join(receipt.missing_metrics)
            self._warn(
                f"a hook of model {self.model!r} waits for {names}, which no push has reported, and does nothing until then: "
                f"call optimizer.report({receipt.missing_metrics[0]}=...) before step(), or push(..., metrics=)"
            )

    def _warn(self, message: str) -> None:
        """Warn the caller of `step`; if the step is in flight, keep the warning for `land`."""
        if self._flight is not None and self._flight.is_mine():
            self._flight.warn(message)
        else:
            warn(message)

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

    @shield
    def pull_state(self) -> Pulled:
        """Parameters, optimizer state and step counts at one version."""
        self._check_usable()
        return self._read(lambda: self._transport.pull_state(pb.PullStateRequest(model=self.model)))

    def _read(self, pull: Callable[[], Pulled]) -> Pulled:
        """Pull until the server answers. ModelLost if the model that this session knows is gone."""
        try:
            pulled = self._retry.run(pull)
        except UnknownModel as error:
            if not self._uid:
                raise
            raise ModelLost(model=self.model) from error
        self._know(pulled.header.model_uid)
        return pulled

    def _pull_options(self, have: tuple[int, int] | None) -> pb.PullOptions:
        """The options of a pull for a worker that holds `have` (timeline, version)."""
        options = pb.PullOptions(dtype=wire_enum(self.pull_wire))
        if have is not None:
            options.have_version = have[1]
        return options


def wire_enum(dtype: torch.dtype | None) -> Any:
    """A dtype as a message's enum; 0 stands for each parameter's own dtype."""
    return 0 if dtype is None else dtypes.to_wire(dtype, "wire")


def _exchanged(pulled: Pulled) -> Step:
    return Receipt.of(pulled.header.receipt), pulled
