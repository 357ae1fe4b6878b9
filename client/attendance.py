"""A worker's place in one model: joining, joining again, what became of a push that was not answered, and uploads.

A push in doubt is settled by joining again: the new epoch makes sure that the push is not applied from then on, and the
join brings its receipt if it was decided before. So it is never sent under another epoch while it may have been applied.
An upload of parameters consumes a sequence as a push does, and is settled as one.

Joining again may also find that the model was restored. Whatever it was that joined, the caller is told of that once, by
the next step or upload: `_heard` is the timeline that the caller knows of.
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
    ModelLost,
    NoAnswer,
    NotAttached,
    PushstepError,
    SessionClosed,
    Superseded,
    Unavailable,
    UnknownWorker,
)
from pushstep.proto.layout import Layout, Slot, with_group
from pushstep.proto.types_pb2 import Identity, Manifest

from . import caller, uploads
from .compression import Compression
from .heartbeat import Heartbeat
from .membership import Member, join
from .policy import Policy, depends_on_who_is_first, difference, to_wire
from .receipt import Outcome, Receipt
from .retry import Retry, TransportFailure, answered
from .sending import Attempts
from .transport import Transport

log = logging.getLogger("pushstep.client")


class Attendance:
    """Owns the membership, and knows which push is in doubt."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        worker: str,
        compression: Compression,
        retry_for_s: float,
        takeover: bool,
    ) -> None:
        self.model = model
        self.worker = worker
        self.compression = compression
        self.last_receipt: Receipt | None = None
        self._transport = transport
        self._retry = Retry(transport.wait, retry_for_s)
        transport.wait.who = f"worker {worker!r} of model {model!r}"
        self._takeover = takeover
        self._pid = os.getpid()
        self._closed = False
        self._heard = 0
        # of the model that this session has joined, or read first: one of the same name is another
        self._uid = b""
        # of the join that was not answered: sent once more it must not fence what came of the first
        self._joining = 0
        self._manifest: Manifest | None = None
        # what `undo_join` brings back
        self._before: tuple[Member | None, bytes, int] = (None, b"", 0)
        self._in_doubt: Identity | None = None
        self._worker_state: bytes | None = None
        self._worker_state_due = False
        self._heartbeat = Heartbeat(transport, model)

    @property
    def _member(self) -> Member | None:
        """The membership: the heartbeat's, which outlives a session that is dropped."""
        return self._heartbeat.member

    @_member.setter
    def _member(self, member: Member | None) -> None:
        self._heartbeat.member = member

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedSession(parent=self._pid)
        if self._closed:
            raise SessionClosed()

    # Joining.

    def join_or_create(
        self,
        manifest: Manifest | None,
        values: Any,
        steps: Sequence[int] = (),
        policy: Policy | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Join under the manifest, creating the model from `values(layout)` if there is none. True if created."""
        wanted = to_wire(policy)
        self._before = self._member, self._uid, self._heard
        self._manifest = manifest

        def create(ticket: pb.CreationTicket) -> Member:
            layout = Layout(ticket.manifest)
            header, body = uploads.creation(self.model, ticket, layout, values(layout), steps, extras or {})
            header.policy = wanted
            return Member(self._transport.upload(header, body).member, layout)

        created = self._join(manifest, create, takeover=self._takeover)
        member = self._joined()
        self._heard = self._heard or member.timeline
        self._heartbeat.start()
        if not created and member.version:
            log.warning(
                "worker %r continues model %r from version %d", self.worker, self.model, member.version
            )
        other = difference(wanted, member.policy)
        if other:
            caller.warn(f"model {self.model!r} has a policy of its own ({other}); the server's holds")
        if depends_on_who_is_first(wanted, member.policy):
            caller.warn(
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
            self._member, created = join(
                self._transport,
                self._retry,
                self.model,
                self.worker,
                manifest,
                takeover,
                self._joining,
                self._member,
                create,
            )
        except PushstepError as error:
            if not isinstance(error, (NoAnswer, Unavailable)):
                self._joining = 0
            raise
        self._joining = 0
        self._know(self._joined().uid)
        return created

    def undo_join(self) -> None:
        """Be as before the last `join_or_create`, here and on the server, whether or not it was answered.

        A model that it has created goes with it, unless something has come of it. What cannot be reached is left to the lease.
        """
        member, attempt = self._member, self._joining
        before, uid, heard = self._before
        if member is before and not attempt:
            return  # it was refused
        self._heartbeat.rest()
        self._manifest, self._joining = None, 0
        self._uid, self._heard, self._in_doubt = uid, heard, None
        request = pb.LeaveRequest(model=self.model, undo=True, attempt=attempt)
        request.identity.CopyFrom(Identity(worker=self.worker) if member is None else member.identity())
        with contextlib.suppress(PushstepError, TransportFailure):
            answered(partial(self._transport.leave, request))

    def member(self) -> Member:
        """Who this session is in the model; joins it if it has not yet, and settles what is in doubt, joins too."""
        self._check_usable()
        if self._member is None:
            self.join_or_create(None, None)
        if self._in_doubt is not None:
            self.settle()
        elif self._joining:  # it may have been taken, which ended the epoch that this session knows of
            self.rejoin()
        return self._joined()

    def rejoin(self) -> Member:
        """Join again: after a restore, a lease that ran out, or a changed manifest."""
        self._join(self._manifest)
        self._worker_state_due = self._worker_state is not None
        return self._joined()

    def _know(self, uid: bytes) -> None:
        """ModelLost unless it is the model that this session knows, or the first."""
        self._uid = self._uid or uid
        if uid != self._uid:
            raise ModelLost(model=self.model)

    def _joined(self) -> Member:
        if self._member is None:
            raise NotAttached(problem="the session has not joined")
        return self._member

    def adopt(self, message: pb.Membership, layout: Layout) -> Member:
        """Become who an upload's answer says: who sent it knows the timeline that it made, and the layout."""
        member = self._member = Member(message, layout)
        self._heard = member.timeline
        return member

    def tell_restore(self) -> bool:
        """Whether the caller is to be told that the model was restored; asked again, it was."""
        told = self._heard != self._joined().timeline
        self._heard = self._joined().timeline
        return told

    def leave_untold(self, timeline: int) -> None:
        """The caller was told of a restore, and leaves it to the next step to pass it on: it knows of `timeline`."""
        self._heard = timeline

    # What became of a push.

    def settle(self) -> Receipt | None:
        """The receipt of a push that was broken off; None if there is none in doubt, or it never will be applied."""
        self._check_usable()
        settled = self.find_out(self._in_doubt) if self._in_doubt is not None else None
        return None if settled is None else self.note(settled)

    def find_out(self, push: Identity, *, in_doubt: bool = True) -> Receipt | None:
        """Join again; the receipt of a push that was sent before, or None: it was not applied and never will be.

        A push that a restore has undone, or that came too late for it, is `superseded`. FateUnknown if it is
        `in_doubt`, whether it was applied, and the server has forgotten. While nobody answers it stays in doubt.
        """
        self._in_doubt = push if in_doubt else None
        member = self.rejoin()
        self._in_doubt = None
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
        """A push's receipt is known."""
        self.compression.settle(applied=receipt.outcome is Outcome.APPLIED)
        self.last_receipt = receipt
        return receipt

    # Uploading.

    def upload_values(self, values: Mapping[tuple[Slot, str], Tensor], fresh: Sequence[str] = ()) -> int:
        """Send whole parameters by slot as a version of their own; the version.

        `fresh`: the names of those whose optimizer state begins anew.
        """
        while True:
            member = self._member_now()
            placed = {
                (member.layout.slot(slot.name, self.model), state): v for (slot, state), v in values.items()
            }
            header, body = uploads.parameters(self.model, member, placed, fresh)
            attempts = Attempts(partial(self._transport.upload, header, body))
            try:
                answer = self._retry.run(attempts)
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
                    self._in_doubt = header.identity
                raise
            else:
                member.sequence = header.identity.sequence
                member.version = answer.version
                return int(answer.version)

    def add_group(self, added: Manifest, values: Mapping[str, Tensor]) -> Member:
        """Add one param group to the model; a group that another worker has added already is joined."""
        layout = with_group(self._member_now().layout, added)
        answer = self._send(lambda member: uploads.group(self.model, member, added, layout, values))
        self._manifest = layout.manifest
        return self.adopt(answer.member, layout)

    def replace_state(self, header: pb.UploadHeader, values: Mapping[tuple[Slot, str], Tensor]) -> Member:
        """Replace the optimizer state; `header` lacks only who sends it and what it carries."""
        answer = self._send(lambda member: uploads.state(self.model, member, header, values))
        return self.adopt(answer.member, self._joined().layout)

    def upload_extras(self, tensors: Mapping[str, Tensor], *, are_all: bool) -> int:
        """Send buffers and frozen values of a module; the version of what is held then. Only the lead's are taken."""
        upload = uploads.extras(self.model, self.member(), tensors, are_all=are_all)
        return int(self._retry.run(partial(self._transport.upload, *upload)).extras_version)

    def pull_extras(self) -> tuple[int, dict[str, Tensor]]:
        """The version and the values of what the model holds beside its parameters."""
        return self._retry.run(partial(self._transport.pull_extras, pb.PullExtrasRequest(model=self.model)))

    def _send(self, make: Callable[[Member], uploads.Upload]) -> pb.UploadResponse:
        """Send what `make` makes of the membership, which may have to be joined anew."""
        while True:
            upload = make(self._member_now())
            try:
                return self._retry.run(partial(self._transport.upload, *upload))
            except (Superseded, LeaseExpired, UnknownWorker):
                self.rejoin()

    def _member_now(self) -> Member:
        """Who this session is, for an upload. Superseded, once, after a restore: what it carries is of before."""
        heard, member = self._heard, self.member()
        if self.tell_restore():
            raise Superseded(model=self.model, timeline=member.timeline, got=heard)
        return member

    # The worker's own bytes.

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


def own_receipt(outcome: Outcome, reason: str, push: Identity, version: int) -> Receipt:
    """The receipt of a push for which the server holds none."""
    return Receipt(outcome, reason, push.worker, push.epoch, push.sequence, push.timeline, version)
