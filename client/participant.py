"""One worker in one model, in the protocol's terms: slots, tensors and messages.

A step that is not answered is sent again, unchanged, until it is; the server applies it once. After a restore the
participant joins again by itself, learns whether the step is in what was restored, and goes on from there. `Session`
adds what a user holds: names, arrays, an optimizer, and an end.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from pushstep.proto import dtypes
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
    OverCapacity,
    PushstepError,
    Quarantined,
    Superseded,
    TooLong,
    UnknownModel,
    UnknownWorker,
)
from pushstep.proto.hyperparameters import wire_values
from pushstep.proto.layout import Layout, Slot
from pushstep.proto.types_pb2 import Identity, Segment

from . import caller
from .attendance import Attendance, own_receipt
from .compression import Compression, Wire, push_and_pull
from .early_push import EarlyPush
from .gradients import Rows, push_body
from .membership import Member
from .mirror import Mirror
from .prefetch import Flight
from .receipt import Outcome, Receipt
from .retry import answered
from .sending import Sending
from .shared_memory import SharedMemory
from .shield import shield
from .transport import Body, Pulled, Transport

# How long the server may keep a push that waits for others before it says so: the log has that after two seconds.
HOLD_S: Final = 1.5
Step = tuple[Receipt, Pulled | None]


class Participant(Attendance):
    """Makes the pushes of a membership, one after the other. Not for use by several threads at once."""

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
            # what is pushed smaller is sent: there is no place for it in a region
            wanted=shared_memory and not self.compression.owes,
        )
        # a session that nobody holds any more ends, too
        weakref.finalize(self, self._heartbeat.abandon, self.memory.abandon).atexit = False
        self._on_reject = on_reject
        self._on_restore = on_restore
        self._flight: Flight[Step] | None = None
        self._told_of_metrics = False
        # here and not in Session, since it is the step that finds a restore, which makes the copy worthless
        self._mirror = Mirror()

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._flight is not None and not self._flight.is_mine():
            self._flight.wait()

    def wait_for_flight(self) -> None:
        """Wait until no push is in flight."""
        self._check_usable()

    def _lands_within(self, seconds: float) -> bool:
        """Whether no push is in flight when that time is up."""
        return self._flight is None or self._flight.wait(seconds)

    def fly(self, call: Callable[[], Step]) -> Flight[Step]:
        """Have `call`, which makes a step, run in a thread of its own; nothing else is asked meanwhile."""
        self._check_usable()
        self._flight = Flight(call)
        self._flight.start()
        return self._flight

    # The step.

    def commit(
        self,
        metrics: Mapping[str, float] | None = None,
        edits: Mapping[int, Mapping[str, float | bool]] | None = None,
        samples: float = 0,
    ) -> pb.PushCommit:
        """What the next push says beside its gradients."""
        return pb.PushCommit(
            metrics=metrics or {},
            samples=samples,
            worker_state=self._worker_state if self._worker_state_due else None,
            edits=_messages(edits or {}),
        )

    def leave(self, edits: Mapping[int, Mapping[str, float | bool]]) -> Sequence[str]:
        """Go, with the edits and the worker state that no push has carried; the edits that did not count."""
        request = pb.LeaveRequest(
            model=self.model,
            identity=self._joined().identity(),
            worker_state=self._worker_state if self._worker_state_due else None,
            edits=_messages(edits),
        )
        try:
            answer = answered(partial(self._transport.leave, request))
        except (TooLong, OverCapacity) as error:  # more bytes than are kept of it: it goes all the same
            caller.warn(f"the last worker_state is lost: {error.message}")
            request.ClearField("worker_state")
            answer = answered(partial(self._transport.leave, request))
        return list(answer.ignored_edits)

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
        """One push under this session's next sequence, sent until it is answered.

        `held` is the (timeline, version) that the gradients were computed on; None: the one at which it joined. With
        `skip` there are none, on purpose: the push only says that this worker is there. With `pull` it is an
        exchange, whose answer is written onto what is held, or onto `onto`. `early` is the same exchange, sent but
        for its commit. A restore in between gives the outcome `superseded` and no parameters: the session has joined
        again, and the caller forgets what it holds and pulls.
        """
        member = self.member()
        while True:
            if self._heard != member.timeline or (held is not None and held[0] < member.timeline):
                # joined again meanwhile, for whatever reason, and the caller does not know of a restore, or what is
                # held here is of before it. What is of a later timeline than the membership came with a pull: the
                # server tells this push of the restore
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
                    # a group was added: names decide whether this worker's slots are still the model's
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
        """Open the stream of the exchange that the next step is expected to be; None when there can be none now."""
        member = self._member
        if self._closed or os.getpid() != self._pid or member is None or self._in_doubt is not None:
            return None
        if self.memory.region is not None:  # nothing has to leave: it lies where it will be read
            return None
        if member.layout is not layout or held is None or held[0] != member.timeline:
            return None
        header = self._push_header(member, held)
        header.pull.CopyFrom(self._pull_options(held))
        header.segments.extend(segments)
        return EarlyPush(self._transport, header, layout)

    def _push_header(self, member: Member, held: tuple[int, int] | None, skip: bool = False) -> pb.PushHeader:
        """What the next push's header says of its sender."""
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
        shared = self.memory.attempt(header, lambda line: line.push(header, commit))
        answer = shared if shared is not None else self._transport.push(header, body, commit)
        return Receipt.of(answer.receipt), None

    def _exchange(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, layout: Layout) -> Step:
        region = self.memory.region
        shared = self.memory.attempt(header, lambda line: line.exchange(header, commit))
        if shared is not None and region is not None:
            return _exchanged(region.answer_of(shared))
        return _exchanged(self._transport.exchange(header, body, commit, layout))

    def _refused(self, error: PushstepError, push: Identity, *, in_doubt: bool) -> Receipt:
        """The receipt of a push that was not answered with one; otherwise raises what there is to say."""
        if isinstance(error, NoAnswer):
            self._in_doubt = push
            raise error
        if in_doubt and isinstance(error, Fenced):
            # who is fenced may not join again to find out
            self._in_doubt = None
            self.compression.settle(applied=False)
            raise FateUnknown(sequence=push.sequence, worker=self.worker) from error
        final = error.consumed or isinstance(error, (Conflict, Fenced))
        if in_doubt and not final:
            # this attempt was refused; one before it, that was not answered, may have been applied
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
        """Take the receipt of a push that joining again has settled, or that a restore came before.

        Raises what the push was rejected with, and Superseded after a restore that the caller has not heard of, if the
        session is to raise them.
        """
        member = self.member()
        self.note(receipt)
        if receipt.timeline != member.timeline:
            self._mirror.forget()
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
        """Say once that a hook waits for what nobody reports."""
        if receipt.missing_metrics and not self._told_of_metrics:
            self._told_of_metrics = True
            names = ", ".join(receipt.missing_metrics)
            self._warn(
                f"a hook of model {self.model!r} waits for {names}, which no push has reported, and does nothing until then: "
                f"call optimizer.report({receipt.missing_metrics[0]}=...) before step(), or push(..., metrics=)"
            )

    def _warn(self, message: str) -> None:
        """Tell the caller of what called `step`; of one in flight, whoever lands it."""
        if self._flight is not None and self._flight.is_mine():
            self._flight.warn(message)
        else:
            caller.warn(message)

    # Pulling.

    def pull_message(self, have: tuple[int, int] | None) -> Pulled:
        """The newest version as it came, for a worker that holds `have` (timeline, version)."""
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
            # it is the next step that joins again, and tells of a restore: until then this is a reader
            request.ClearField("identity")
            return self._read(pull)

    @shield
    def pull_state(self) -> Pulled:
        """Parameters, optimizer state and step counts at one version."""
        self._check_usable()
        return self._read(lambda: self._transport.pull_state(pb.PullStateRequest(model=self.model)))

    def _read(self, pull: Callable[[], Pulled]) -> Pulled:
        """Pull until it is answered. ModelLost if the model that this session knows is gone."""
        try:
            pulled = self._retry.run(pull)
        except UnknownModel as error:
            if not self._uid:
                raise
            raise ModelLost(model=self.model) from error
        self._know(pulled.header.model_uid)
        return pulled

    def _pull_options(self, have: tuple[int, int] | None) -> pb.PullOptions:
        """What to ask of an exchange for a worker that holds `have` (timeline, version)."""
        options = pb.PullOptions(dtype=wire_enum(self.pull_wire))
        if have is not None:
            options.have_version = have[1]
        return options


def wire_enum(dtype: torch.dtype | None) -> Any:
    """A dtype as a message's enum; 0 stands for each parameter's own."""
    return 0 if dtype is None else dtypes.to_wire(dtype, "wire")


def _messages(edits: Mapping[int, Mapping[str, float | bool]]) -> list[pb.GroupEdit]:
    return [pb.GroupEdit(group=group, values=wire_values(values)) for group, values in edits.items()]


def _exchanged(pulled: Pulled) -> Step:
    return Receipt.of(pulled.header.receipt), pulled
