"""A worker's membership in one model: joins, rejoins, the outcome of a push without an answer, and uploads.

A push in doubt is resolved by joining again. The new epoch ensures that the push is not applied from then on, and the
join brings its receipt if it was decided before. So a push is never sent under another epoch while it may have been
applied. An upload of parameters consumes a sequence as a push does, and is resolved in the same way.

A rejoin may also find that the model was restored. The caller is told of a restore once, by the next step or upload,
whichever call has joined again: `known_timeline` is the timeline that the caller knows of.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    FateUnknown,
    Fenced,
    ForkedSession,
    LeaseExpired,
    ManifestChanged,
    ManifestMismatch,
    ModelLost,
    NoAnswer,
    NotAttached,
    OverCapacity,
    PushstepError,
    SessionClosed,
    Superseded,
    TooLong,
    Unavailable,
    UnknownWorker,
)
from pushstep.proto.types_pb2 import Identity, Manifest
from pushstep.proto.wire.hyperparameters import group_edits
from pushstep.proto.wire.layout import Layout, Slot, with_group

from ..gradients.compression import Compression
from ..transport.attempts import Uploading
from ..transport.channel import Transport
from ..transport.retry import Retry, TransportFailure, answered
from ..warn import warn
from . import uploads
from .heartbeat import Heartbeat
from .member import Member, join
from .policy import Policy, depends_on_who_is_first, difference, to_wire
from .receipt import Outcome, Receipt, own_receipt
from .worker_state import WorkerState

log = logging.getLogger("pushstep.client")


class Membership:
    """Owns the membership and its heartbeat, and knows which push is in doubt."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        worker: str,
        compression: Compression,
        retry_for_s: float,
        takeover: bool,
        before_use: Callable[[], None],
    ) -> None:
        """`before_use` is called before each use; it waits while another thread uses the membership."""
        self.model = model
        self.worker = worker
        self.compression = compression
        self.last_receipt: Receipt | None = None
        self.transport = transport
        self.retry = Retry(transport.wait, retry_for_s)
        transport.wait.who = f"worker {worker!r} of model {model!r}"
        self._takeover = takeover
        self._before_use = before_use
        self._pid = os.getpid()
        self.closed = False
        # the timeline that the caller knows of; 0 before the first join
        self.known_timeline = 0
        # of the model that this session joined or read first: a later model of the same name is another one
        self.uid = b""
        # the attempt number of a join without an answer: a retry of it must not fence the membership that the first got
        self._joining = 0
        self._manifest: Manifest | None = None
        # the manifest with a group whose addition has broken off: the server may have the group
        self._adding: Manifest | None = None
        # what `undo_join` restores: the membership, `uid` and `known_timeline`
        self._before: tuple[Member | None, bytes, int] = (None, b"", 0)
        self.in_doubt: Identity | None = None
        self.worker_state = WorkerState()
        self.heartbeat = Heartbeat(transport, model)

    @property
    def current(self) -> Member | None:
        """The membership, if there is one. The heartbeat holds it, since it outlives a session that is dropped."""
        return self.heartbeat.member

    @current.setter
    def current(self, member: Member | None) -> None:
        self.heartbeat.member = member

    def check_usable(self) -> None:
        """Raise ForkedSession or SessionClosed; wait while another thread uses the membership."""
        if os.getpid() != self._pid:
            raise ForkedSession(parent=self._pid)
        if self.closed:
            raise SessionClosed()
        self._before_use()

    @property
    def is_over(self) -> bool:
        """True if the session is closed, or belongs to the parent of this process."""
        return self.closed or os.getpid() != self._pid

    # Joining.

    def join_or_create(
        self,
        manifest: Manifest | None,
        values: Any,
        steps: Sequence[int] = (),
        policy: Policy | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Join under the manifest, or create the model from `values(layout)`. True if created."""
        wanted = to_wire(policy)
        self._before = self.current, self.uid, self.known_timeline
        self._manifest = manifest

        def create(ticket: pb.CreationTicket) -> Member:
            layout = Layout(ticket.manifest)
            upload = uploads.creation(self.model, ticket, layout, values(layout), steps, extras or {})
            upload[0].policy = wanted
            return Member(self.transport.upload(*upload).member, layout)

        created = self._join(manifest, create, takeover=self._takeover)
        member = self.joined()
        self.known_timeline = self.known_timeline or member.timeline
        self.heartbeat.start()
        if not created and member.version:
            log.warning(
                "worker %r continues model %r from version %d", self.worker, self.model, member.version
            )
        other = difference(wanted, member.policy)
        if other:
            warn(f"the model's own policy ({other}) holds; `pushstep policy {self.model} --set` changes it")
        if depends_on_who_is_first(wanted, member.policy):
            warn(
                "policy='sync' waits for whoever is there when a round begins, so who starts first steps alone: say how many "
                "there are, as policy='sync', workers=N"
            )
        return created

    def _join(
        self,
        manifest: Manifest | None,
        create: Callable[[pb.CreationTicket], Member] | None = None,
        *,
        takeover: bool = False,
    ) -> bool:
        self._joining = self._joining or secrets.randbits(63) + 1
        try:
            self.current, created = join(
                self.transport,
                self.retry,
                self.model,
                self.worker,
                manifest,
                takeover,
                self._joining,
                self.current,
                self._told_version(),
                create,
            )
        except PushstepError as error:
            if not isinstance(error, (NoAnswer, Unavailable)):
                self._joining = 0
            raise
        self._joining = 0
        self.know(self.joined().uid)
        return created

    def undo_join(self) -> None:
        """Undo the last `join_or_create`, here and on the server, whether or not it was answered.

        The server deletes a model that this join created, unless the model has changed or another worker has joined it.
        If the server cannot be reached, the lease ends the membership.
        """
        member, attempt = self.current, self._joining
        before, uid, known_timeline = self._before
        if member is before and not attempt:
            return  # the join was refused
        self.heartbeat.rest()
        self._manifest, self._joining = None, 0
        self.uid, self.known_timeline, self.in_doubt = uid, known_timeline, None
        request = pb.LeaveRequest(model=self.model, undo=True, attempt=attempt)
        request.identity.CopyFrom(Identity(worker=self.worker) if member is None else member.identity())
        with contextlib.suppress(PushstepError, TransportFailure):
            answered(partial(self.transport.leave, request))

    def member(self) -> Member:
        """The membership. Joins first if there is none, and resolves a push or a join in doubt."""
        self.check_usable()
        member = self.heartbeat.member
        if member is None:
            self.join_or_create(None, None)
        if self.in_doubt is not None:
            self.settle()
        elif self._joining:  # that join may have been accepted, which has ended the known epoch
            self.rejoin()
        elif member is not None:
            return member
        return self.joined()

    def join_by_name(self) -> None:
        """Have a rejoin take the model's current layout: the values of this session go by name."""
        self._manifest = None

    def rejoin(self) -> Member:
        """Join again: after a restore, an expired lease or a changed manifest."""
        try:
            self._join(self._manifest)
        except ManifestMismatch:
            if self._adding is None:
                raise
            self._join(self._adding)
            self._manifest, self._adding = self._adding, None
        self.worker_state.rejoined()
        return self.joined()

    def know(self, uid: bytes) -> None:
        """Remember the first model's uid. ModelLost if a later uid is another one."""
        self.uid = self.uid or uid
        if uid != self.uid:
            raise ModelLost(model=self.model)

    def joined(self) -> Member:
        """The membership as it is. NotAttached if there is none."""
        if self.current is None:
            raise NotAttached(problem="the session has not joined")
        return self.current

    def adopt(self, message: pb.Membership, layout: Layout) -> Member:
        """Take the membership from an upload's answer; the caller then knows of its timeline."""
        member = self.current = Member(message, layout)
        self.known_timeline = member.timeline
        return member

    def _told_version(self) -> int:
        """The newest version of the membership's timeline that the server has told of."""
        member, receipt = self.current, self.last_receipt
        at = 0 if member is None else int(member.version)
        of_now = member is not None and receipt is not None and receipt.timeline == member.timeline
        return max(at, receipt.version) if receipt is not None and of_now else at

    def tell_restore(self) -> Superseded | None:
        """What the caller has to be told of a restore, or of a crash that has undone versions; counts as told then.

        RolledBack is of a crash. None if the caller knows.
        """
        member, known = self.joined(), self.known_timeline
        self.known_timeline = member.timeline
        return None if known == member.timeline else member.undone_since(known, self.model)

    def leave_untold(self, timeline: int) -> None:
        """Have the next step tell the caller of a restore: the caller knows of `timeline` only."""
        self.known_timeline = timeline

    def leave(self, edits: Mapping[int, Mapping[str, float | bool]]) -> Sequence[str]:
        """Leave with the edits and worker state that no push has carried; the ignored edits' names."""
        request = pb.LeaveRequest(
            model=self.model,
            identity=self.joined().identity(),
            worker_state=self.worker_state.due(),
            edits=group_edits(edits),
        )
        try:
            answer = answered(partial(self.transport.leave, request))
        except (TooLong, OverCapacity) as error:
            # the server does not keep that many bytes: leave without them
            warn(f"the last worker_state is lost: {error.message}")
            request.ClearField("worker_state")
            answer = answered(partial(self.transport.leave, request))
        return list(answer.ignored_edits)

    # The outcome of a push.

    def settle(self) -> Receipt | None:
        """Resolve the push in doubt: its receipt; None if there is none, or it will never be applied."""
        self.check_usable()
        settled = self.find_out(self.in_doubt) if self.in_doubt is not None else None
        return None if settled is None else self.note(settled)

    def find_out(self, push: Identity, *, in_doubt: bool = True) -> Receipt | None:
        """Join again; the receipt of an earlier push, or None: it was not applied and never will be.

        The outcome is `superseded` if a restore undid the push or came before it. FateUnknown if the push is `in_doubt`
        and the server has forgotten its receipt. If the join is not answered, the push stays in doubt.
        """
        self.in_doubt = push if in_doubt else None
        member = self.rejoin()
        self.in_doubt = None
        found = member.receipt_of(push)
        if found is not None:
            return found
        if in_doubt and member.has_forgotten(push):
            self.compression.settle(applied=False)
            raise FateUnknown(sequence=push.sequence, worker=self.worker)
        if member.timeline != push.timeline:
            return own_receipt(Outcome.SUPERSEDED, "superseded", push, member.version)
        self.compression.settle(applied=False)
        return None

    def note(self, receipt: Receipt) -> Receipt:
        """Record the receipt of a push, here and in the compression's residuals; return it."""
        self.compression.settle(applied=receipt.outcome is Outcome.APPLIED)
        self.last_receipt = receipt
        return receipt

    # Uploading.

    def upload_values(self, values: Mapping[tuple[Slot, str], Tensor], fresh: Sequence[str] = ()) -> int:
        """Send whole parameters by slot, which the server makes a version of their own; that version.

        `fresh`: the names of the parameters whose optimizer state starts anew. Superseded, once, after a restore;
        FateUnknown if this session is fenced or its receipt forgotten while the upload is in doubt.
        """
        while True:
            member = self._member_now()
            placed = {
                (member.layout.slot(slot.name, self.model), state): v for (slot, state), v in values.items()
            }
            header, body, layout = uploads.parameters(self.model, member, placed, fresh)
            attempts = Uploading(partial(self.transport.upload, header, body, layout))
            try:
                answer = self.retry.run(attempts)
            except (Superseded, LeaseExpired, ManifestChanged, UnknownWorker):
                settled = self.find_out(header.identity, in_doubt=attempts.in_doubt)
                if settled is not None:
                    self.note(settled)
                    self._member_now()
                    return settled.version
            except Fenced as error:
                if attempts.in_doubt:
                    raise FateUnknown(sequence=header.identity.sequence, worker=self.worker) from error
                raise
            except BaseException as error:
                if attempts.in_doubt or not isinstance(error, PushstepError):
                    self.in_doubt = header.identity
                raise
            else:
                member.sequence = header.identity.sequence
                member.version = answer.version
                return int(answer.version)

    def add_group(self, added: Manifest, values: Mapping[str, Tensor]) -> Member:
        """Add one param group, or join it if another worker has added it already; the membership."""
        layout = with_group(self._member_now().layout, added)
        self._adding = layout.manifest
        answer = self._send(lambda member: uploads.group(self.model, member, added, layout, values))
        self._manifest, self._adding = layout.manifest, None
        return self.adopt(answer.member, layout)

    def replace_state(self, header: pb.UploadHeader, values: Mapping[tuple[Slot, str], Tensor]) -> Member:
        """Replace the optimizer state. `header` is complete except for the identity, hash and segments."""
        answer = self._send(lambda member: uploads.state(self.model, member, header, values))
        return self.adopt(answer.member, self.joined().layout)

    def upload_extras(self, tensors: Mapping[str, Tensor], *, are_all: bool) -> int:
        """Send a module's buffers and frozen values; their version then. Only the lead's count."""
        upload = uploads.extras(self.model, self.member(), tensors, are_all=are_all)
        return int(self.retry.run(partial(self.transport.upload, *upload)).extras_version)

    def pull_extras(self) -> tuple[int, dict[str, Tensor]]:
        """The version and the values, by name, of the buffers and frozen values that the model holds."""
        return self.retry.run(partial(self.transport.pull_extras, pb.PullExtrasRequest(model=self.model)))

    def _send(self, make: Callable[[Member], uploads.Upload]) -> pb.UploadResponse:
        """Send the upload that `make` builds for the membership; after a rejoin build and send it again."""
        while True:
            upload = make(self._member_now())
            try:
                return self.retry.run(partial(self.transport.upload, *upload))
            except (Superseded, LeaseExpired, UnknownWorker):
                self.rejoin()

    def _member_now(self) -> Member:
        """The membership, for an upload. Superseded, once, after a restore: the values are older."""
        member = self.member()
        if (restored := self.tell_restore()) is not None:
            raise restored
        return member
