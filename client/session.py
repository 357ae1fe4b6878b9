"""A session: one worker's connection to one model, and everything that it may ask of it.

The session keeps the worker's identity. A step that is not answered is sent again, unchanged, until it is; the
server applies it once. After a restore the session joins again by itself and goes on from the restored version.
"""

from __future__ import annotations

import os
import socket
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    ForkedSession,
    LeaseExpired,
    ManifestChanged,
    NoAnswer,
    NotAttached,
    PushstepError,
    SessionClosed,
    Superseded,
)
from pushstep.proto.frames import Piece
from pushstep.proto.layout import Layout, Slot, with_group
from pushstep.proto.types_pb2 import Identity, Manifest, Parameter, ParamGroup

from .gradients import Rows, as_array, as_gradient, push_body, values_body
from .membership import Member, join
from .receipt import Outcome, Receipt, wire_value
from .retry import Retry, TransportFailure, answered
from .transport import Body, Pulled, Transport

if TYPE_CHECKING:
    from .remote_optimizer import RemoteOptimizer

Array = np.ndarray[Any, Any]
Wire = torch.dtype | tuple[torch.dtype | None, torch.dtype | None] | None


def connect(
    address: str,
    *,
    model: str,
    worker: str | None = None,
    wire: Wire = None,
    timeout_s: float = 30.0,
    retry_for_s: float = 300.0,
    takeover: bool = False,
    on_reject: Literal["raise", "skip"] = "raise",
    on_restore: Literal["continue", "raise"] = "continue",
) -> Session:
    """A session with the server at "HOST:PORT" or "unix:/path".

    `wire`: the dtype of what travels (None: each parameter's own), or a pair (pushes, pulls). `timeout_s` bounds
    each attempt, and how long to wait for a server to answer at all; `retry_for_s` bounds a whole step.
    `on_reject="skip"` warns where a rejected push would raise. Raises ServerUnavailable when no server answers.
    """
    transport = Transport(address, timeout_s)
    try:
        transport.wait_for_server()
    except PushstepError:
        transport.close()
        raise
    name = worker if worker is not None else f"{socket.gethostname()}-{os.getpid()}"
    return Session(transport, model, name, wire, retry_for_s, takeover, on_reject, on_restore)


class Session:
    """One worker's session; see `connect`. Not for use by several threads at once."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        worker: str,
        wire: Wire,
        retry_for_s: float,
        takeover: bool,
        on_reject: str,
        on_restore: str,
    ) -> None:
        self.model = model
        self.worker = worker
        self.push_wire, self.pull_wire = wire if isinstance(wire, tuple) else (wire, wire)
        for dtype in (self.push_wire, self.pull_wire):
            if dtype is not None:
                dtypes.to_wire(dtype, "wire")
        self.last_receipt: Receipt | None = None
        self._transport = transport
        self._retry = Retry(transport.address, retry_for_s)
        self._takeover = takeover
        self._on_reject = on_reject
        self._on_restore = on_restore
        self._pid = os.getpid()
        self._closed = False
        self._member: Member | None = None
        self._manifest: Manifest | None = None
        self._in_doubt: Identity | None = None
        # the numpy interface's own copy of the parameters, and the (timeline, version) that it is at
        self._mirror: dict[str, Tensor] = {}
        self._mirror_at: tuple[int, int] | None = None
        self._mirror_layout: Layout | None = None
        self._before_close: list[Callable[[], None]] = []
        self._attached: RemoteOptimizer | None = None
        self._stop_heartbeat = threading.Event()
        self._heartbeat: threading.Thread | None = None

    # Joining.

    def attach(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        module: nn.Module | None = None,
        names: Sequence[str] | Mapping[Tensor, str] | None = None,
    ) -> RemoteOptimizer:
        """An optimizer whose steps the server takes, in place of torch's or pushstep.optim's Adadelta or Adagrad.

        The first worker to attach creates the model from its parameters' values and its optimizers' states; later
        ones take the server's values and hyperparameters. Names come from `module`, else `names`, else the
        optimizer's own. A list of optimizers makes one model.
        """
        from .remote_optimizer import RemoteOptimizer

        self._check_usable()
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        single = isinstance(optimizer, torch.optim.Optimizer)
        self._attached = RemoteOptimizer(self, optimizers, module, names, single=single)
        return self._attached

    def create(
        self, parameters: Mapping[str, Array | Tensor], groups: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Create the model from arrays by name, or join it if it exists (its values stand).

        Each group is {"rule": "adadelta" or "adagrad", "params": [names], and hyperparameters}; None puts all
        parameters into one Adadelta group.
        """
        self._check_usable()
        if groups is None:
            groups = [{"rule": "adadelta", "params": list(parameters)}]
        manifest = Manifest()
        values: dict[str, Tensor] = {}
        for index, group in enumerate(groups):
            settings = {k: wire_value(v) for k, v in group.items() if k not in ("rule", "params")}
            manifest.groups.append(ParamGroup(rule=group["rule"], optimizer=0, values=settings))
            for name in group["params"]:
                values[name] = torch.as_tensor(parameters[name])
                manifest.parameters.append(
                    Parameter(
                        name=name,
                        shape=values[name].shape,
                        dtype=dtypes.to_wire(values[name].dtype, f"parameter {name!r}"),
                        group=index,
                    )
                )
        self.join_or_create(manifest, lambda layout: {(slot, ""): values[slot.name] for slot in layout.slots})

    def join_or_create(self, manifest: Manifest | None, values: Any, steps: Sequence[int] = ()) -> bool:
        """Join under the manifest, creating the model from `values(layout)` if there is none. True if created."""
        self._manifest = manifest

        def create(ticket: pb.CreationTicket) -> pb.Membership:
            layout = Layout(ticket.manifest)
            body = values_body(layout, values(layout))
            header = pb.UploadHeader(
                model=self.model,
                kind=pb.UPLOAD_KIND_CREATE,
                ticket=ticket.ticket,
                manifest=ticket.manifest,
                segments=body.segments,
                steps=steps,
            )
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
        self._start_heartbeat()
        return created

    def member(self) -> Member:
        """Who this session is in the model; joins it if it has not yet."""
        self._check_usable()
        if self._member is None:
            self.join_or_create(None, None)
        if self._in_doubt is not None:
            # nobody answered the last push: a new epoch makes sure that it is not applied from here on, and brings
            # its receipt if it had been
            doubted, self._in_doubt = self._in_doubt, None
            settled = self.rejoin().receipt_of(doubted)
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
        return self._member

    def adopt(self, message: pb.Membership) -> Member:
        """Become who an upload's answer says."""
        self._member = Member(message)
        return self._member

    # Pushing.

    def push(self, grads: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> Receipt:
        """Hand gradients in by name: arrays, tensors, or (ids, rows) pairs. Returns when they are applied."""
        receipt, _ = self.step(self._named(grads), self._base_version(), metrics=metrics, pull=None)
        return receipt

    def exchange(
        self, grads: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> tuple[Receipt, dict[str, Array]]:
        """Push and pull in one round trip: the receipt, and every parameter at its version or a newer one."""
        options = self._pull_options(self._mirror_at)
        receipt, pulled = self.step(self._named(grads), self._base_version(), metrics=metrics, pull=options)
        if pulled is None:
            return receipt, self.pull()
        self._take(pulled)
        return receipt, self._arrays()

    def _named(self, grads: Mapping[str, Any]) -> dict[Slot, Tensor | Rows]:
        layout = self.member().layout
        slots = [(layout.slot(name, self.model), gradient) for name, gradient in grads.items()]
        return {slot: as_gradient(gradient, slot) for slot, gradient in slots}

    def _base_version(self) -> int:
        member = self.member()
        if self._mirror_at is not None and self._mirror_at[0] == member.timeline:
            return self._mirror_at[1]
        return member.version

    def step(
        self,
        gradients: Mapping[Slot, Tensor | Rows],
        base_version: int,
        *,
        edits: Mapping[int, Mapping[str, float | bool]] | None = None,
        metrics: Mapping[str, float] | None = None,
        worker_state: bytes | None = None,
        pull: pb.PullOptions | None,
    ) -> tuple[Receipt, Pulled | None]:
        """One push under this session's next sequence, sent until it is answered.

        With `pull` it is an exchange. A restore in between gives the outcome `superseded` and no parameters: the
        session has joined again, and the caller pulls.
        """
        member = self.member()
        header = pb.PushHeader(
            model=self.model,
            base_version=base_version,
            metrics=metrics or {},
            worker_state=worker_state,
            pull=pull,
            edits=[
                pb.GroupEdit(group=group, values={name: wire_value(v) for name, v in values.items()})
                for group, values in (edits or {}).items()
            ],
        )
        while True:
            body = push_body(member.layout, gradients, self.push_wire)
            del header.segments[:]
            header.segments.extend(body.segments)
            header.manifest_hash = member.layout.manifest_hash
            header.identity.CopyFrom(member.next_identity())
            try:
                if pull is None:
                    answer = self._retry.run(partial(self._transport.push, header, body))
                    receipt, pulled = Receipt.of(answer.receipt), None
                else:
                    pulled = self._retry.run(partial(self._transport.exchange, header, body, member.layout))
                    receipt = Receipt.of(pulled.header.receipt)
            except Superseded:
                return self._superseded(header.identity), None
            except (LeaseExpired, ManifestChanged) as error:
                member = self.rejoin()
                settled = member.receipt_of(header.identity)
                if settled is not None:
                    return self._note(settled), None
                if isinstance(error, ManifestChanged):
                    # a group was added: names decide whether this worker's slots are still the model's
                    gradients = {member.layout.slot(s.name, self.model): g for s, g in gradients.items()}
                continue
            except NoAnswer:
                self._in_doubt = header.identity
                raise
            except PushstepError as error:
                if not error.consumed:
                    raise
                member.sequence = header.identity.sequence
                return self._rejected(error, header.identity), None
            member.sequence = header.identity.sequence
            member.version = receipt.version
            member.lead = receipt.lead
            return self._note(receipt), pulled

    def _note(self, receipt: Receipt) -> Receipt:
        self.last_receipt = receipt
        return receipt

    def _rejected(self, error: PushstepError, identity: Identity) -> Receipt:
        receipt = self._note(_own_receipt(Outcome.REJECTED, error.code, identity, self.member().version))
        if self._on_reject == "raise":
            raise error
        warnings.warn(f"push rejected: {error.message}", RuntimeWarning, stacklevel=4)
        return receipt

    def _superseded(self, identity: Identity) -> Receipt:
        member = self.rejoin()
        if self._on_restore == "raise":
            raise Superseded(model=self.model, timeline=member.timeline, got=identity.timeline)
        warnings.warn(
            f"model {self.model!r} was restored to version {member.version} (timeline {member.timeline}); this step "
            "was not applied, going on from there",
            RuntimeWarning,
            stacklevel=4,
        )
        self._mirror_at = None
        return self._note(_own_receipt(Outcome.SUPERSEDED, "superseded", identity, member.version))

    # Pulling.

    def pull(self) -> dict[str, Array]:
        """Every parameter by name at the newest version. A session that only pulls is a reader and never joins."""
        self._check_usable()
        have = self._mirror_at
        request = pb.PullRequest(
            model=self.model,
            options=self._pull_options(have),
            timeline=have[0] if have else 0,
            manifest_hash=self._mirror_layout.manifest_hash if self._mirror_layout is not None else 0,
        )
        self._take(self._retry.run(lambda: self._transport.pull(request, self._mirror_layout)))
        return self._arrays()

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

    def pull_rows(self, name: str, ids: Any) -> Array:
        """Some rows of one parameter, in the order of `ids`, at one version."""
        self._check_usable()
        layout = self._layout_for_reading()
        slot = layout.slot(name, self.model)
        request = pb.PullRowsRequest(
            model=self.model,
            parameter=slot.name,
            ids=[int(row) for row in np.asarray(ids).ravel()],
            dtype=_wire_enum(self.pull_wire),
        )
        pulled = self._retry.run(lambda: self._transport.pull_rows(request, layout))
        return as_array(next(pulled.rows())[2])

    def pull_state(self) -> Pulled:
        """Parameters, optimizer state and step counts at one version."""
        self._check_usable()
        return self._retry.run(lambda: self._transport.pull_state(pb.PullStateRequest(model=self.model)))

    def upload(self, values: Mapping[str, Any] | None = None) -> int:
        """Send parameter values as a version of their own; the version. None sends what an attached optimizer holds."""
        if values is None:
            if self._attached is None:
                raise NotAttached(problem="no optimizer is attached: pass values={name: array}")
            return self._attached.upload()
        member = self.member()
        slots = {member.layout.slot(name, self.model): torch.as_tensor(v) for name, v in values.items()}
        for slot, value in slots.items():
            as_gradient(value, slot)
        return self.upload_values({(slot, ""): value.to(slot.dtype) for slot, value in slots.items()})

    def upload_values(self, values: Mapping[tuple[Slot, str], Tensor]) -> int:
        """Send whole parameters by slot as a version of their own; the version."""
        member = self.member()
        body = values_body(member.layout, values)
        header = pb.UploadHeader(
            model=self.model,
            kind=pb.UPLOAD_KIND_PARAMETERS,
            identity=member.next_identity(),
            segments=body.segments,
            manifest_hash=member.layout.manifest_hash,
        )
        answer = self._retry.run(lambda: self._transport.upload(header, body))
        member.sequence += 1
        member.version = answer.version
        return int(answer.version)

    def add_group(self, added: Manifest, values: Mapping[str, Tensor]) -> Member:
        """Add one param group to the model; a group that another worker has added already is joined."""
        member = self.member()
        layout = with_group(member.layout, added)
        body = values_body(layout, {(layout.slot(name, self.model), ""): v for name, v in values.items()})
        header = pb.UploadHeader(
            model=self.model,
            kind=pb.UPLOAD_KIND_GROUP,
            identity=member.next_identity(),
            manifest=added,
            segments=body.segments,
        )
        answer = self._retry.run(lambda: self._transport.upload(header, body))
        self._manifest = layout.manifest
        return self.adopt(answer.member)

    def upload_extras(self, tensors: Mapping[str, Tensor]) -> None:
        """Send a module's buffers and frozen values, for exports and snapshots. Only the lead's are kept."""
        member = self.member()
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        header = pb.UploadHeader(
            model=self.model,
            kind=pb.UPLOAD_KIND_EXTRAS,
            identity=member.next_identity(),
            extras_bytes=len(content),
        )
        piece = Piece(torch.frombuffer(bytearray(content), dtype=torch.uint8), torch.uint8)
        self._retry.run(lambda: self._transport.upload(header, Body((), [[piece]])))

    def before_close(self, task: Callable[[], None]) -> None:
        """Have `task` run when the session is closed, while it can still talk."""
        self._before_close.append(task)

    def replace_state(self, header: pb.UploadHeader, values: Mapping[tuple[Slot, str], Tensor]) -> Member:
        """Replace the optimizer state; `header` lacks only who sends it and what it carries."""
        member = self.member()
        body = values_body(member.layout, values)
        header.model = self.model
        header.identity.CopyFrom(member.next_identity())
        header.manifest_hash = member.layout.manifest_hash
        header.segments.extend(body.segments)
        return self.adopt(self._retry.run(lambda: self._transport.upload(header, body)).member)

    def _layout_for_reading(self) -> Layout:
        if self._member is not None:
            return self._member.layout
        if self._mirror_layout is None:
            self.pull()
        if self._mirror_layout is None:
            raise NotAttached(problem="nothing was pulled")
        return self._mirror_layout

    def _pull_options(self, have: tuple[int, int] | None) -> pb.PullOptions:
        options = pb.PullOptions(dtype=_wire_enum(self.pull_wire))
        if have is not None:
            options.have_version = have[1]
        return options

    def pull_options(self, have: tuple[int, int] | None) -> pb.PullOptions:
        """What to ask of an exchange for a worker that holds `have` (timeline, version)."""
        return self._pull_options(have)

    def _take(self, pulled: Pulled) -> None:
        self._mirror_layout = pulled.layout
        for slot, _, values in pulled.dense():
            self._mirror[slot.name] = values.to(slot.dtype, copy=True)
        for slot, ids, rows in pulled.rows():
            self._mirror[slot.name][ids] = rows.to(slot.dtype)
        for slot in pulled.layout.slots:
            if slot.start == slot.stop:
                self._mirror.setdefault(slot.name, torch.zeros(slot.shape, dtype=slot.dtype))
        self._mirror_at = (pulled.header.timeline, pulled.header.version)

    def _arrays(self) -> dict[str, Array]:
        layout = self._mirror_layout
        names = [slot.name for slot in layout.slots] if layout is not None else []
        if any(name not in self._mirror for name in names):
            # a group was added, which makes no version: what this copy lacks did not come as a change
            self._mirror_at = None
            return self.pull()
        return {name: as_array(self._mirror[name]) for name in names}

    @property
    def version(self) -> int | None:
        """The version of the last pull."""
        return None if self._mirror_at is None else self._mirror_at[1]

    # Life.

    def _start_heartbeat(self) -> None:
        if self._heartbeat is None:
            self._heartbeat = threading.Thread(target=self._beat, name="pushstep-heartbeat", daemon=True)
            self._heartbeat.start()

    def _beat(self) -> None:
        member = self._member
        while member is not None and not self._stop_heartbeat.wait(member.lease_s / 3):
            member = self._member
            if member is None:
                return
            try:
                request = pb.HeartbeatRequest(model=self.model, identity=member.identity())
                answered(partial(self._transport.heartbeat, request))
            except (PushstepError, TransportFailure):
                continue  # the next step finds out, and says so to the user

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedSession(parent=self._pid)
        if self._closed:
            raise SessionClosed()

    def close(self) -> None:
        """Leave the model and close the connection. Closing twice, or in a forked child, does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        self._stop_heartbeat.set()
        self._retry.for_s = 0.0  # a server that is away is not waited for
        try:
            if self._member is not None:
                for task in self._before_close:
                    task()
                self._transport.leave(pb.LeaveRequest(model=self.model, identity=self._member.identity()))
        except Exception as error:  # noqa: BLE001 - the lease ends by itself; a close must not fail
            warnings.warn(f"could not leave: {type(error).__name__}", RuntimeWarning, stacklevel=2)
        finally:
            self._closed = True
            self._transport.close()
            if self._heartbeat is not None:
                self._heartbeat.join(timeout=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "reader" if self._member is None else f"epoch {self._member.epoch}"
        return f"<Session {self.worker!r} of model {self.model!r} at {self._transport.address}, {where}>"


def _wire_enum(dtype: torch.dtype | None) -> Any:
    return 0 if dtype is None else dtypes.to_wire(dtype, "wire")


def _own_receipt(outcome: Outcome, reason: str, identity: Identity, version: int) -> Receipt:
    return Receipt(
        outcome, reason, identity.worker, identity.epoch, identity.sequence, identity.timeline, version
    )
