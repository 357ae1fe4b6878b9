"""The books of one model: its version, groups and hooks, and the tickets and receipts written from them.

Writing a ticket is what makes a version: the pushes' edits are applied, the hooks run over what is stepped, the
version moves on. Until then a refusal leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pushstep.proto.errors import PushstepError
from pushstep.proto.hyperparameters import Values
from pushstep.proto.types_pb2 import Contribution, Durability, Identity, Outcome, Receipt, Ticket

from . import gate
from .candidate import Candidate
from .groups import ParamGroups
from .hooks.chain import HookChain
from .hooks.hook import StepContext
from .staging import StagedPush


def is_before(lineage: Sequence[tuple[int, int]], timeline: int, version: int) -> bool:
    """Whether what stands on `lineage` was made from a version of an ended timeline."""
    return version <= dict(lineage).get(timeline, -1)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be stepped: these pushes, which together are `push`, in this way."""

    candidates: Sequence[Candidate]
    push: StagedPush
    lr_scale: float = 1.0
    # of a round, what the weighted sum was divided by
    divisor: float | None = None
    notes: tuple[str, ...] = ()


class Ledger:
    """Owns the version, and knows which versions it stands on. One write at a time, each whole."""

    def __init__(self, name: str, timeline: int, groups: ParamGroups, hooks: HookChain) -> None:
        self.name = name
        self.timeline = timeline
        self.version = 0
        # the (timeline, version) that each restore went on from
        self.lineage: list[tuple[int, int]] = []
        self.groups = groups
        self.hooks = hooks

    def holds(self, timeline: int, version: int) -> bool:
        """Whether what the model is now was made from a version, or a restore has undone it."""
        return timeline == self.timeline or is_before(self.lineage, timeline, version)

    def go_back(self, lineage: Sequence[tuple[int, int]], timeline: int) -> None:
        """Go on from the last of `lineage`, on a new timeline."""
        self.lineage, self.timeline = list(lineage), timeline
        self.version = self.lineage[-1][1]

    def receipt(self, identity: Identity, policy: str, *, lead: bool) -> Receipt:
        """A receipt as it begins: of no outcome yet, at the version of now."""
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
        """The ticket of the next version, and what observers are told; the pushes' receipts are completed.

        A named error, with nothing changed: from a guard hook, or because a group refuses what is to be stepped.
        """
        planned = self._planned(order, receipts)
        context = self._context(order)
        self.hooks.step_pre(context)
        self.groups.write(planned)
        self.groups.note_rows(order.push.parts)
        ticket = Ticket(
            identity=order.candidates[0].identity,
            version=context.version,
            factor=context.factor,
            lr_scale=order.lr_scale,
            groups=self.groups.messages(),
        )
        if order.divisor is not None:
            ticket.divisor = order.divisor
            ticket.contributions.extend(
                Contribution(identity=candidate.identity, weight=candidate.weight)
                for candidate in order.candidates
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
        bases = [candidate.header.base_version for candidate in order.candidates]
        return StepContext(
            worker="+".join(candidate.worker for candidate in order.candidates),
            base_version=min(bases),
            version=self.version + 1,
            staleness=max(0, self.version - min(bases)),
            gradient_norm=order.push.norm,
            metrics=_mean_metrics(order.candidates),
        )

    def edit(self, edits: Mapping[int, Values], *, lead: bool) -> list[str]:
        """Apply the edits of a worker that leaves, as far as they count; the names of the others."""
        try:
            planned, ignored = self.groups.plan_worker_edits(edits, lead, self.name)
            self.groups.check_rows(planned)
        except PushstepError:
            return [f"{index}.{name}" for index, edit in edits.items() for name in edit]
        self.groups.write(planned)
        return ignored

    def _planned(self, order: Order, receipts: Sequence[Receipt]) -> dict[int, Values]:
        """The values that the step is taken with; the names of the edits that do not count go into the receipts.

        SparseNotSupported if what is stepped cannot be with them.
        """
        planned: dict[int, Values] = {}
        for candidate, receipt in zip(order.candidates, receipts, strict=True):
            edits = candidate.edits()
            try:
                with_edits, ignored = self.groups.plan_worker_edits(edits, receipt.lead, self.name, planned)
                if with_edits != planned:
                    gate.require_steppable(order.push, self.groups, with_edits)
            except PushstepError:
                # good when the push came, and contradicted since: by an operator, or by the round's other pushes
                ignored = [f"{index}.{name}" for index, edit in edits.items() for name in edit]
            else:
                planned = with_edits
            receipt.ignored_edits.extend(ignored)
        gate.require_steppable(order.push, self.groups, planned)
        return planned

    def _complete(self, receipt: Receipt, order: Order, context: StepContext) -> None:
        receipt.outcome = Outcome.OUTCOME_APPLIED
        receipt.version = self.version
        receipt.clip_factor = context.factor
        receipt.step_norm = context.gradient_norm
        receipt.lr_scale = order.lr_scale
        receipt.contributors.extend(candidate.worker for candidate in order.candidates)
        receipt.notes.extend(order.notes)
        if context.factor != 1:
            receipt.notes.append(f"gradient scaled by {context.factor:.6g} ({self.hooks.transforms()})")
        receipt.groups.extend(self.groups.messages())
        receipt.missing_metrics.extend(self.hooks.missing_metrics())


def _mean_metrics(candidates: Sequence[Candidate]) -> Mapping[str, float]:
    """Each metric's mean over the pushes that report it, by their weight."""
    if len(candidates) == 1:
        return dict(candidates[0].header.metrics)
    totals: dict[str, tuple[float, float]] = {}
    for candidate in candidates:
        for name, value in candidate.header.metrics.items():
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = total + candidate.weight * value, weight + candidate.weight
    return {name: total / weight for name, (total, weight) in totals.items()}
