"""Gradients that leave while backward still runs.

In one step, a hook on each parameter records which gradients come, how often and in what order. In the next step,
buckets of neighbours leave in that order as soon as they are complete, and `step()` only commits. `step()` digests the
gradients as they are then, and compares that with the digest of what left. This finds every change in between, even one
through `.data` or an `unscale_` that torch does not count as a write. The early push is then withdrawn and the
gradients are sent as an ordinary push. A second backward and `zero_grad()` withdraw it, too.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import BodyDigest, Piece
from pushstep.proto.wire.layout import Layout, Slot

from ..attachment.parameters import Parameters
from ..gradients.body import Rows
from ..transport.shield import shield
from ..transport.streams import Body
from ..warn import warn
from ..worker.early_push import EarlyPush
from ..worker.worker import Worker

# The size hardly matters: 268 to 285 ms per step with 1 to 16 MiB, 301 without overlap (16 M float32, TCP, two cores).
BUCKET_BYTES: Final = 4 << 20
# An unused early push costs both sides as much as a used one, so overlap stops after so many in a row.
USELESS_IN_A_ROW: Final = 3
_DIGEST_ELEMENTS: Final = 1 << 18

Gradients = Mapping[Slot, Tensor | Rows]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters whose gradients leave together: the segments, and the slots of each segment."""

    parameters: Sequence[Tensor]
    segments: Sequence[Segment]
    slots: Sequence[Sequence[Slot]]

    def pieces(self, gradients: Mapping[Slot, Tensor]) -> list[list[Piece]]:
        """Return the pieces to send, one list per segment."""
        return [
            [Piece(gradients[slot], dtypes.to_torch(segment.dtype, "segment")) for slot in slots]
            for segment, slots in zip(self.segments, self.slots, strict=True)
        ]


class Plan:
    """The expected next backward: how often each parameter's hook fires, in which order, and the buckets to send."""

    def __init__(
        self,
        fired: Mapping[Tensor, int],
        slots: Mapping[Tensor, Slot],
        layout: Layout,
        wire: torch.dtype | None,
    ) -> None:
        self.fired = dict(fired)
        self.slots = slots
        self.layout = layout
        self.buckets: list[Bucket] = []
        waiting: list[Tensor] = []
        for parameter in fired:
            waiting.append(parameter)
            if sum(p.nbytes for p in waiting) >= BUCKET_BYTES:
                self._add(waiting, wire)
                waiting = []
        if waiting:
            self._add(waiting, wire)
        self.bucket_of = {p: number for number, bucket in enumerate(self.buckets) for p in bucket.parameters}
        self.segments = [segment for bucket in self.buckets for segment in bucket.segments]

    def _add(self, parameters: Sequence[Tensor], wire: torch.dtype | None) -> None:
        runs = self.layout.dense_segments((self.slots[p] for p in parameters), wire, of_push=True)
        self.buckets.append(Bucket(parameters, [s for s, _ in runs], [slots for _, slots in runs]))

    def is_of(self, fired: Mapping[Tensor, int], layout: Layout) -> bool:
        """True if a plan made from these arguments would equal this one."""
        mine, now = ([(id(p), times) for p, times in each.items()] for each in (self.fired, fired))
        return self.layout is layout and mine == now

    def body(self, gradients: Gradients) -> Body | None:
        """Return the push body in this plan's order; None if the gradients are not those that it expects."""
        dense = {slot: gradient for slot, gradient in gradients.items() if isinstance(gradient, Tensor)}
        if len(dense) < len(gradients) or dense.keys() != set(self.slots.values()):
            return None
        return Body(self.segments, [pieces for bucket in self.buckets for pieces in bucket.pieces(dense)])


class Overlap:
    """Owns the hooks on one optimizer's parameters, and at most one open early push."""

    def __init__(self, worker: Worker, parameters: Parameters) -> None:
        self._worker = worker
        self._parameters = parameters
        self._pid = os.getpid()
        self._lock = threading.Lock()  # hooks run in the thread that runs backward
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._plan: Plan | None = None
        self._useless = 0
        self.steps = 0  # steps that only committed an early push
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._early: EarlyPush | None = None
        self._fired: dict[Tensor, int] = {}
        self._missing = [len(bucket.parameters) for bucket in self._plan.buckets] if self._plan else []
        self._handed = 0
        self._spoilt: str | None = None
        self._given_up = self._plan is None

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Keep hooks on these parameters, and on no others."""
        wanted = list(parameters)
        gone = self._handles.keys() - set(wanted)
        for parameter in gone:
            self._handles.pop(parameter).remove()
        if gone:
            with self._lock:
                self._plan = None
                self._withdraw()
                self._begin_anew()
        for parameter in wanted:
            if parameter.requires_grad and parameter not in self._handles:
                register: Any = parameter.register_post_accumulate_grad_hook  # torch gives it no types
                self._handles[parameter] = register(_weakly(self))

    def supersede(self) -> None:
        """Withdraw the gradients that have left: `zero_grad()` discards them."""
        with shield, self._lock:
            self._withdraw()
            self._begin_anew()

    def stop(self) -> None:
        """Withdraw the early push and remove the hooks."""
        with shield, self._lock:
            self._withdraw()
            self._plan = None
            self._begin_anew()
            _remove(self._handles)

    # While backward runs.

    def on_gradient(self, parameter: Tensor) -> None:
        """Count a gradient that is ready, and send each bucket that is now complete. Runs in backward's thread."""
        if os.getpid() != self._pid:
            return
        with shield, self._lock:
            fired = self._fired.pop(parameter, 0) + 1
            self._fired[parameter] = fired
            plan = self._plan
            if plan is None or self._given_up:
                return
            expected = plan.fired.get(parameter, 0)
            if fired > expected:
                self._spoil("backward ran once more")
            elif fired == expected:
                self._missing[plan.bucket_of[parameter]] -= 1
                while (
                    self._handed < len(plan.buckets)
                    and not self._missing[self._handed]
                    and not self._given_up
                ):
                    self._hand(plan, plan.buckets[self._handed])

    def _hand(self, plan: Plan, bucket: Bucket) -> None:
        found = [(plan.slots[p], p.grad) for p in bucket.parameters]
        gradients = {
            slot: gradient for slot, gradient in found if gradient is not None and _sendable(gradient)
        }
        if len(gradients) < len(bucket.parameters):
            self._spoil("a gradient is of another kind than in the step before")
            return
        if self._early is None:
            self._early = self._worker.begin_push(self._parameters.at, plan.layout, plan.segments)
        if self._early is None:
            self._given_up = True
            return
        self._early.hand(bucket.pieces(gradients))
        self._handed += 1

    def _spoil(self, why: str) -> None:
        if self._early is not None:
            self._spoilt = why
        self._withdraw()
        self._given_up = True

    def _withdraw(self) -> None:
        if self._early is not None:
            self._early.withdraw()
            self._early = None

    # At the step.

    def take(self, gradients: Gradients, layout: Layout) -> EarlyPush | None:
        """Return the complete, uncommitted early push of exactly these gradients, or None if they must be sent."""
        with self._lock:
            early, plan, spoilt = self._early, self._plan, self._spoilt
            body = plan.body(gradients) if plan is not None else None
            complete = plan is not None and self._handed == len(plan.buckets)
            if plan is None or body is None or not plan.is_of(self._fired, layout):
                self._plan = self._planned(gradients, layout)
            self._begin_anew()
        if early is not None:
            if body is None or not complete:
                spoilt = "other gradients than in the step before were there"
            elif digest_of(body) != _sealed(early):
                spoilt = "a gradient was changed after backward, or the stream ended early"
            else:
                early.body = body
                self._useless = 0
                self.steps += 1
                return early
            early.withdraw()
        if spoilt is not None:
            self._count_useless(spoilt)
        return None

    def _planned(self, gradients: Gradients, layout: Layout) -> Plan | None:
        slots = {p: self._parameters.slot_of(p, layout) for p in self._fired}
        sendable = all(p.grad is not None and _sendable(p.grad) for p in slots)
        plan = Plan(self._fired, slots, layout, self._worker.compression.wire)
        # with fewer than two buckets nothing would leave before backward ends
        return (
            plan if sendable and gradients.keys() == set(slots.values()) and len(plan.buckets) > 1 else None
        )

    def _count_useless(self, why: str) -> None:
        self._useless += 1
        if self._useless >= USELESS_IN_A_ROW:
            self.stop()
            warn(
                f"overlap is off: in {self._useless} steps in a row the gradients that left during backward could not "
                f"be used ({why}); clip_grad_norm_, a GradScaler and edits of .grad change them afterwards"
            )


def _weakly(overlap: Overlap) -> Callable[[Tensor], None]:
    """Return a hook with a weak reference: else the parameters would keep a dropped session alive."""
    reference = weakref.ref(overlap)

    def hook(parameter: Tensor) -> None:
        known = reference()
        # in a graph that torch.compile makes, nothing leaves: the step sends such gradients
        if known is not None and not torch.compiler.is_compiling():
            known.on_gradient(parameter)

    return hook


def _remove(handles: dict[Tensor, torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _sealed(early: EarlyPush) -> int | None:
    try:
        return early.seal()
    except BaseException:  # interrupted
        early.withdraw()
        raise


def _sendable(gradient: Tensor) -> bool:
    return gradient.layout is torch.strided and gradient.device.type == "cpu"


def digest_of(body: Body) -> int:
    """Return the digest of a body's current content without sending it. 64 MB of float32 take 2.6 ms on one core.

    Raises TypeError for a body with a source that can be read only once.
    """
    digest = BodyDigest(body.segments)
    for pieces in body.pieces:
        for piece in pieces:
            if not isinstance(piece, Piece):
                raise TypeError(
                    f"{type(piece).__name__} is made once, and cannot be digested before it is sent"
                )
            flat = piece.source.detach().reshape(-1)
            for start in range(0, flat.numel(), _DIGEST_ELEMENTS):
                part = flat[start : start + _DIGEST_ELEMENTS].to(piece.dtype)
                digest.update(memoryview(part.view(torch.uint8).numpy().data))
    return digest.value
