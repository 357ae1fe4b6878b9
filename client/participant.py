"""One worker in one model, in the protocol's terms: slots, tensors and messages.

The participant keeps the worker's identity. A step that is not answered is sent again, unchanged, until it is; the
server applies it once. After a restore the participant joins again by itself and goes on from the restored version.
`Session` adds what a user holds: names, arrays, an optimizer, and an end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    Conflict,
    FateUnknown,
    Fenced,
    ForkedSession,
    LeaseExpired,
    ManifestChanged,
    NoAnswer,
    NotAttached,
    PushstepError,
    Quarantined,
    SessionClosed,
    Superseded,
)
from pushstep.proto.hyperparameters import wire_values
from pushstep.proto.layout import Layout, Slot, with_group
from pushstep.proto.types_pb2 import Identity, Manifest, Segment

from . import caller, uploads
from .compression import Compression, Wire, push_and_pull
from .early_push import EarlyPush
from .gradients import Rows, push_body
from .heartbeat import Heartbeat
from .membership import Member, join
from .mirror import Mirror
from .policy import Policy, difference, to_wire
from .prefetch import Flight
from .receipt import Outcome, Receipt
from .retry import Retry
from .sending import Sending
from .shared_memory import SharedMemory
from .transport import Body, Pulled, Transport

Step = tuple[Receipt, Pulled | None]


class Participant:
    """Owns the membership and the sequence of pushes under it. Not for use by several threads at once."""

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
        self.model = model
        self.worker = worker
        push_wire, self.pull_wire = push_and_pull(wire)
        self.compression = Compression(push_wire, top_k)
        self.last_receipt: Receipt | None = None
        self._transport = transport
        self._retry = Retry(transport.address, retry_for_s)
        self.memory = SharedMemory(
            transport,
            model,
            (push_wire, self.pull_wire),
            # what is pushed smaller is sent: there is no place for it in a region
            wanted=shared_memory and not self.compression.owes,
        )
        self._takeover = takeover
        self._on_reject = on_reject
        self._on_restore = on_restore
        self._pid = os.getpid()
        self._closed = False
        self._member: Member | None = None
        self._manifest: Manifest | None = None
        self._in_doubt: Identity | None = None
        self._worker_state: bytes | None = None
        self._worker_state_due = False
        self._flight: Flight[Step] | None = None
        # here and not in Session, since it is the step that finds a restore, which makes the copy worthless
        self._mirror = Mirror()
        self._heartbeat = Heartbeat(transport, model, lambda: self._member)

    # Joining.

    def join_or_create(
        self,
        manifest: Manifest | None,
        values: Any,
        steps: Sequence[int] = (),
        policy: Policy | None = None,
    ) -> bool:
        """Join under the manifest, creating the model from `values(layout)` if there is none. True if created."""
        self._manifest = manifest
        wanted = to_wire(policy)

        def create(ticket: pb.CreationTicket) -> pb.Membership:
            layout = Layout(ticket.manifest)
            header, body = uploads.creation(self.model, ticket, layout, values(layout), steps)
            header.policy = wanted
            return self._transport.upload(header, body).member

        self._member, created = join(
            self._transport,
            self._retry,
            self.model,
            self.worker,
            manifest,
            self._takeover,
            self._member,
            create,
        )
        self._heartbeat.start()
        other = difference(wanted, self._member.policy)
        if other:
            caller.warn(f"model {self.model!r} has a policy of its own ({other}); the server's holds")
        return created

    def member(self) -> Member:
        """Who this session is in the model; joins it if it has not yet."""
        self._check_usable()
        if self._member is None:
            self.join_or_create(None, None)
        if self._in_doubt is not None:
            # nobody answered the last push: a new epoch makes sure that it is not applied from here on, and brings
            # its receipt if it had been
            doubted = self._in_doubt
            member = self.rejoin()
            self._in_doubt = None
            settled = member.receipt_of(doubted)
            self.compression.settle(applied=settled is not None and settled.outcome is Outcome.APPLIED)
            if settled is None and member.epoch <= doubted.epoch:
                # epochs only grow: the server has forgotten this worker, and its receipts with it
                raise FateUnknown(sequence=doubted.sequence, worker=self.worker)
            self.last_receipt = settled or self.last_receipt
        if self._member is None:
            raise NotAttached(problem="the session has not joined")
        return self._member

    def rejoin(self) -> Member:
        """Join again: after a restore, a lease that ran out, or a changed manifest."""
        old = self._member
        self._member, _ = join(
            self._transport, self._retry, self.model, self.worker, self._manifest, False, old, None
        )
        self._worker_state_due = self._worker_state is not None
        return self._member

    @property
    def worker_state(self) -> bytes:
        """Up to 64 KiB of this worker's own: its place in the data, its random state.

        What is set here travels with the next push and lies beside the model, in its snapshots too; a session that
        joins under this worker's name finds here what the name's last push carried.
        """
        if self._worker_state is None and self._member is not None:
            return bytes(self._member.worker_state)
        return self._worker_state or b""

    @worker_state.setter
    def worker_state(self, value: bytes) -> None:
        if not isinstance(value, bytes):
            raise TypeError(f"worker_state is bytes, not {type(value).__name__}")
        self._worker_state, self._worker_state_due = value, True

    def adopt(self, message: pb.Membership) -> Member:
        """Become who an upload's answer says."""
        self._member = Member(message)
        return self._member

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedSession(parent=self._pid)
        if self._closed:
            raise SessionClosed()
        if self._flight is not None and not self._flight.is_mine():
            self._flight.wait()

    def wait_for_flight(self) -> None:
        """Wait until no push is in flight."""
        self._check_usable()

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
            edits=[
                pb.GroupEdit(group=group, values=wire_values(values))
                for group, values in (edits or {}).items()
            ],
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
        """One push under this session's next sequence, sent until it is answered.

        `held` is the (timeline, version) that the gradients were computed on; None: the one at which it joined. With
        `skip` there are none, on purpose: the push only says that this worker is there. With `pull` it is an
        exchange, whose answer is written onto what is held, or onto `onto`. `early` is the same exchange, sent but
        for its commit. A restore in between gives the outcome `superseded` and no parameters: the session has joined
        again, and the caller forgets what it holds and pulls.
        """
        member = self.member()
        while True:
            if held is not None and held[0] != member.timeline:
                # joined again meanwhile, for whatever reason, and what is held here is of an ended timeline
                return self._ended(member.next_identity()), None
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
            try:
                if not pull:
                    push = partial(self._push, commit=commit)
                    answer = self._retry.run(Sending(push, header, body))
                    receipt, pulled = Receipt.of(answer.receipt), None
                else:
                    exchange = partial(self._exchange, commit=commit, layout=member.layout)
                    begun = None if early is None else partial(early.finish, commit)
                    pulled = self._retry.run(Sending(exchange, header, body, begun))
                    receipt = Receipt.of(pulled.header.receipt)
            except Superseded:
                self.rejoin()
                return self._ended(header.identity), None
            except (LeaseExpired, ManifestChanged) as error:
                member = self.rejoin()
                settled = member.receipt_of(header.identity)
                if settled is not None:
                    return self._note(settled), None
                if isinstance(error, ManifestChanged):
                    # a group was added: names decide whether this worker's slots are still the model's
                    gradients = {member.layout.slot(s.name, self.model): g for s, g in gradients.items()}
                early = None
                continue
            except NoAnswer:
                self._in_doubt = header.identity
                raise
            except PushstepError as error:
                if not (error.consumed or isinstance(error, (Quarantined, Conflict, Fenced))):
                    raise
                if error.consumed or isinstance(error, Conflict):
                    member.sequence = header.identity.sequence
                return self._rejected(error, header.identity), None
            member.sequence = header.identity.sequence
            member.lead = receipt.lead
            if commit.worker_state == (self._worker_state or b""):
                self._worker_state_due = False
            return self._note(receipt), pulled

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
            hold_s=self._transport.timeout_s / 3,
        )

    def _push(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit) -> pb.PushResponse:
        shared = self.memory.attempt(header, lambda line: line.push(header, commit))
        return shared if shared is not None else self._transport.push(header, body, commit)

    def _exchange(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, layout: Layout) -> Pulled:
        region = self.memory.region
        shared = self.memory.attempt(header, lambda line: line.exchange(header, commit))
        if shared is not None and region is not None:
            return region.answer_of(shared)
        return self._transport.exchange(header, body, commit, layout)

    def _note(self, receipt: Receipt) -> Receipt:
        self.compression.settle(applied=receipt.outcome is Outcome.APPLIED)
        self.last_receipt = receipt
        return receipt

    def _rejected(self, error: PushstepError, identity: Identity) -> Receipt:
        receipt = self._note(_own_receipt(Outcome.REJECTED, error.code, identity, self.member().version))
        if self._on_reject == "raise":
            raise error
        self._warn(f"push rejected: {error.message}")
        return receipt

    def _ended(self, identity: Identity) -> Receipt:
        """The receipt of a push whose timeline a restore has ended, or Superseded if the session is to raise it."""
        member = self.member()
        self._mirror.forget()
        if self._on_restore == "raise":
            raise Superseded(model=self.model, timeline=member.timeline, got=identity.timeline)
        self._warn(
            f"model {self.model!r} was restored to version {member.version} (timeline {member.timeline}); this step "
            "was not applied, going on from there"
        )
        return self._note(_own_receipt(Outcome.SUPERSEDED, "superseded", identity, member.version))

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
        return self._retry.run(lambda: self._transport.pull(request, member.layout))

    def pull_state(self) -> Pulled:
        """Parameters, optimizer state and step counts at one version."""
        self._check_usable()
        return self._retry.run(lambda: self._transport.pull_state(pb.PullStateRequest(model=self.model)))

    def _pull_options(self, have: tuple[int, int] | None) -> pb.PullOptions:
        """What to ask of an exchange for a worker that holds `have` (timeline, version)."""
        options = pb.PullOptions(dtype=wire_enum(self.pull_wire))
        if have is not None:
            options.have_version = have[1]
        return options

    # Uploading.

    def upload_values(self, values: Mapping[tuple[Slot, str], Tensor]) -> int:
        """Send whole parameters by slot as a version of their own; the version."""
        member = self.member()
        answer = self._send(uploads.parameters(self.model, member, values))
        member.sequence += 1
        member.version = answer.version
        return int(answer.version)

    def add_group(self, added: Manifest, values: Mapping[str, Tensor]) -> Member:
        """Add one param group to the model; a group that another worker has added already is joined."""
        member = self.member()
        layout = with_group(member.layout, added)
        answer = self._send(uploads.group(self.model, member, added, layout, values))
        self._manifest = layout.manifest
        return self.adopt(answer.member)

    def replace_state(self, header: pb.UploadHeader, values: Mapping[tuple[Slot, str], Tensor]) -> Member:
        """Replace the optimizer state; `header` lacks only who sends it and what it carries."""
        return self.adopt(self._send(uploads.state(self.model, self.member(), header, values)).member)

    def upload_extras(self, tensors: Mapping[str, Tensor]) -> None:
        """Send a module's buffers and frozen values, for exports and snapshots. Only the lead's are kept."""
        self._send(uploads.extras(self.model, self.member(), tensors))

    def _send(self, upload: uploads.Upload) -> pb.UploadResponse:
        return self._retry.run(lambda: self._transport.upload(*upload))


def wire_enum(dtype: torch.dtype | None) -> Any:
    """A dtype as a message's enum; 0 stands for each parameter's own."""
    return 0 if dtype is None else dtypes.to_wire(dtype, "wire")


def _own_receipt(outcome: Outcome, reason: str, identity: Identity, version: int) -> Receipt:
    return Receipt(
        outcome, reason, identity.worker, identity.epoch, identity.sequence, identity.timeline, version
    )
