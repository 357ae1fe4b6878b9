"""The committed state of one model: version, groups and hooks. Tickets and receipts are written from it.

Writing a ticket makes a version: the pushes' edits are applied, the hooks run over what is stepped, and the version
goes up by one. A refusal before that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import Contribution, Durability, Identity, Outcome, Receipt, Ticket
from pushstep.proto.wire.hyperparameters import Values

from ..staging.gradient import StagedPush
from .groups import ParamGroups
from .hooks.chain import HookChain
from .hooks.hook import StepContext
from .push import PendingPush


def is_before(lineage: Sequence[tuple[int, int]], timeline: int, version: int) -> bool:
    """True if a state with this `lineage` descends from `version` of `timeline`, which has ended."""
    return version <= dict(lineage).get(timeline, -1)


@dataclass(frozen=True, slots=True)
class Order:
    """One step to write a ticket for: its pushes, what is stepped, and how it is scaled.

    `push` is what is stepped: the gradient of the one push, or the sum of a round's pushes.
    """

    pushes: Sequence[PendingPush]
    push: StagedPush
    lr_scale: float = 1.0
    # the number that a round's weighted sum was divided by; None outside a round
    divisor: float | None = None
    notes: tuple[str, ...] = ()


class Commits:
    """Owns the version and the lineage of restores that it descends from.

    Writes one ticket at a time, whole or not at all.
    """

    def __init__(self, name: str, timeline: int, groups: ParamGroups, hooks: HookChain) -> None:
        self.name = name
        self.timeline = timeline
        self.version = 0
        # the (timeline, version) that each restore continued from
        self.lineage: list[tuple[int, int]] = []
        self.groups = groups
        self.hooks = hooks

    def holds(self, timeline: int, version: int) -> bool:
        """True if the current state descends from (timeline, version); False if a restore has undone it."""
        return timeline == self.timeline or is_before(self.lineage, timeline, version)

    def go_back(self, lineage: Sequence[tuple[int, int]], timeline: int) -> None:
        """Continue from the last entry of `lineage`, on a new timeline."""
        self.lineage, self.timeline = list(lineage), timeline
        self.version = self.lineage[-1][1]

    def receipt(self, identity: Identity, policy: str, *, lead: bool) -> Receipt:
        """A new receipt: without an outcome yet, at the current version."""
        return Receipt(
            identity=identity,
            version=self.version,
            lead=lead,
            durability=Durability.DURABILITY_APPLIED,
            clip_factor=1.0,
            lr_scale=1.0,
            policy=policy,
        )

    def write(self, order: Order, receipts: Sequence[Receipt]) -> tuple[Ticket, dict[str, Any]]:
        """Write the next version's ticket and complete the receipts. Returns it and the facts for observers.

        Raises a named error and changes nothing if a hook refuses the step (RejectedByHook), or a group refuses the
        gradient (SparseNotSupported).
        """
        planned = self._planned(order, receipts)
        context = self._context(order)
        self.hooks.step_pre(context)
        self.groups.write(planned)
        self.groups.note_rows(order.push.parts)
        ticket = Ticket(
            identity=order.pushes[0].identity,
            version=context.version,
            factor=context.factor,
            lr_scale=order.lr_scale,
            groups=self.groups.messages(),
        )
        if order.divisor is not None:
            ticket.divisor = order.divisor
            ticket.contributions.extend(
                Contribution(identity=pending.identity, weight=pending.weight) for pending in order.pushes
            )
        self.version = ticket.version
        self.hooks.step_post(context, self.groups)
        for receipt in receipts:
            self._complete(receipt, order, context)
        facts = {
            "worker": context.worker,
            "staleness": context.staleness,
            "gradient_norm": context.gradient_norm,
            "factor": context.factor,
            "metrics": dict(context.metrics),
        }
        return ticket, facts

    def _context(self, order: Order) -> StepContext:
        bases = [pending.header.base_version for pending in order.pushes]
        return StepContext(
            worker="+".join(pending.worker for pending in order.pushes),
            base_version=min(bases),
            version=self.version + 1,
            staleness=max(0, self.version - min(bases)),
            gradient_norm=order.push.norm,
            metrics=_mean_metrics(order.pushes),
        )

    def edit(self, edits: Mapping[int, Values], *, lead: bool) -> list[str]:
        """Apply the edits of a worker that leaves. Returns the names of those that do not count.

        The names are of the form "group.name". If the groups refuse the edits, none is applied and all names return.
        """
        try:
            planned, ignored = self.groups.plan_worker_edits(edits, lead, self.name)
            self.groups.check_rows(planned)
        except PushstepError:
            return [f"{index}.{name}" for index, edit in edits.items() for name in edit]
        self.groups.write(planned)
        return ignored

    def _planned(self, order: Order, receipts: Sequence[Receipt]) -> dict[int, Values]:
        """The values that the step is taken with. The names of edits that do not count go into the receipts.

        SparseNotSupported if a group refuses the gradient under these values.
        """
        planned: dict[int, Values] = {}
        for pending, receipt in zip(order.pushes, receipts, strict=True):
            edits = pending.edits()
            try:
                with_edits, ignored = self.groups.plan_worker_edits(edits, receipt.lead, self.name, planned)
                if with_edits != planned:
                    self.groups.require_steppable(order.push, with_edits)
            except PushstepError:
                # valid when the push came; an operator or another push of the round has contradicted it since
                ignored = [f"{index}.{name}" for index, edit in edits.items() for name in edit]
            else:
                planned = with_edits
            receipt.ignored_edits.extend(ignored)
        self.groups.require_steppable(order.push, planned)
        return planned

    def _complete(self, receipt: Receipt, order: Order, context: StepContext) -> None:
        receipt.outcome = Outcome.OUTCOME_APPLIED
        receipt.version = self.version
        receipt.clip_factor = context.factor
        receipt.step_norm = context.gradient_norm
        receipt.lr_scale = order.lr_scale
        receipt.contributors.extend(pending.worker for pending in order.pushes)
        receipt.notes.extend(order.notes)
        if context.factor != 1:
            receipt.notes.append(f"gradient scaled by {context.factor:.6g} ({self.hooks.transforms()})")
        receipt.groups.extend(self.groups.messages())
        receipt.missing_metrics.extend(self.hooks.missing_metrics())


def _mean_metrics(pushes: Sequence[PendingPush]) -> Mapping[str, float]:
    """Each metric's mean over the pushes that report it, weighted by `PendingPush.weight`."""
    if len(pushes) == 1:
        return dict(pushes[0].header.metrics)
    totals: dict[str, tuple[float, float]] = {}
    for pending in pushes:
        for name, value in pending.header.metrics.items():
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = total + pending.weight * value, weight + pending.weight
    return {name: total / weight for name, (total, weight) in totals.items()}
