"""The committed state of one model: version, groups and hooks. Tickets are written from it, and receipts (receipts.py).

Writing a ticket makes a version: the pushes' edits are applied, the hooks run over what is stepped, and the version
goes up by one. A refusal before that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import Contribution, Durability, Ticket
from pushstep.proto.wire.hyperparameters import Values

from ..staging.gradient import StagedPush
from .groups import EditPlan, ParamGroups
from .hooks.chain import HookChain
from .hooks.hook import StepContext
from .push import PendingPush

# What operators edit, as `Revisions` and ETags name it.
GROUPS: Final = "groups"
HOOKS: Final = "hooks"
POLICY: Final = "policy"
GATE: Final = "gate"
DURABILITY: Final = "durability"


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


@dataclass(frozen=True, slots=True)
class Written:
    """A ticket that was written, and what the receipts of its pushes and the observers are told."""

    ticket: Ticket
    context: StepContext
    # for each push: whether its worker is the lead, and the names of its edits that do not count
    leads: Sequence[bool]
    ignored: Sequence[Sequence[str]]

    @property
    def facts(self) -> dict[str, Any]:
        """For observers."""
        context = self.context
        return {
            "version": context.version,
            "worker": context.worker,
            "staleness": context.staleness,
            "gradient_norm": context.gradient_norm,
            "factor": context.factor,
            "metrics": dict(context.metrics),
        }


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
        # how safe a push is when it is acknowledged, as receipts say
        self.durability: Durability = Durability.DURABILITY_APPLIED

    def holds(self, timeline: int, version: int) -> bool:
        """True if the current state descends from (timeline, version); False if a restore has undone it."""
        return timeline == self.timeline or is_before(self.lineage, timeline, version)

    def go_back(self, lineage: Sequence[tuple[int, int]], timeline: int) -> None:
        """Continue from the last entry of `lineage`, on a new timeline."""
        self.lineage, self.timeline = list(lineage), timeline
        self.version = self.lineage[-1][1]

    def plan(
        self, pending: PendingPush, *, lead: bool, before: Mapping[int, Values] | None = None
    ) -> EditPlan:
        """What a push's edits do to the groups. Writes nothing.

        The gate plans, and the ticket takes the same plan, unless the groups or the lead have changed in between.
        before: what the earlier pushes of the same round have planned. Raises UnknownGroup or InvalidHyperparameter.
        """
        plan = pending.plan
        if plan is None or before or not plan.holds(self.groups, lead):
            plan = pending.plan = self.groups.plan(pending.edits(), lead, self.name, before)
        return plan

    def write(self, order: Order, leads: Sequence[bool]) -> Written:
        """Write the next version's ticket. `leads`: for each push, whether its worker is the lead.

        Raises a named error and changes nothing if a hook refuses the step (RejectedByHook), or a group refuses the
        gradient (SparseNotSupported).
        """
        planned, ignored = self._planned(order, leads)
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
            frozen=self.groups.frozen,
            operations=context.operations,
        )
        if order.divisor is not None:
            ticket.divisor = order.divisor
            ticket.contributions.extend(
                Contribution(identity=pending.identity, weight=pending.weight) for pending in order.pushes
            )
        self.version = context.version
        self.hooks.step_post(context, self.groups)
        ticket.averages.extend(context.averages)
        return Written(ticket, context, leads, ignored)

    def _context(self, order: Order) -> StepContext:
        base = min([pending.header.base_version for pending in order.pushes])
        return StepContext(
            worker="+".join([pending.worker for pending in order.pushes]),
            base_version=base,
            version=self.version + 1,
            staleness=max(0, self.version - base),
            gradient_norm=order.push.norm,
            metrics=_mean_metrics(order.pushes),
        )

    def edit(self, edits: Mapping[int, Values], *, lead: bool) -> list[str]:
        """Apply the edits of a worker that leaves. Returns the names of those that do not count.

        The names are of the form "group.name". If the groups refuse the edits, none is applied and all names return.
        """
        try:
            plan = self.groups.plan(edits, lead, self.name)
            self.groups.check_rows(plan.planned)
        except PushstepError:
            return _names(edits)
        self.groups.write(plan.planned)
        return list(plan.ignored)

    def _planned(
        self, order: Order, leads: Sequence[bool]
    ) -> tuple[Mapping[int, Values], list[Sequence[str]]]:
        """The values that the step is taken with, and for each push the names of its edits that do not count.

        SparseNotSupported if a group refuses the gradient under these values.
        """
        planned: Mapping[int, Values] = {}
        ignored: list[Sequence[str]] = []
        for pending, lead in zip(order.pushes, leads, strict=True):
            if not pending.header.edits:
                ignored.append(())
                continue
            try:
                plan = self.plan(pending, lead=lead, before=planned)
                if plan.planned != planned:
                    self.groups.require_steppable(order.push, plan.planned)
            except PushstepError:
                # valid when the push came; an operator or another push of the round has contradicted it since
                ignored.append(_names(pending.edits()))
            else:
                planned = plan.planned
                ignored.append(plan.ignored)
        self.groups.require_steppable(order.push, planned)
        return planned, ignored


def _names(edits: Mapping[int, Values]) -> list[str]:
    """The names of edits, of the form "group.name"."""
    return [f"{index}.{name}" for index, edit in edits.items() for name in edit]


def _mean_metrics(pushes: Sequence[PendingPush]) -> Mapping[str, float]:
    """Each metric's mean over the pushes that report it, weighted by `PendingPush.weight`."""
    if len(pushes) == 1:
        metrics = pushes[0].header.metrics
        return dict(metrics) if metrics else {}
    totals: dict[str, tuple[float, float]] = {}
    for pending in pushes:
        for name, value in pending.header.metrics.items():
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = total + pending.weight * value, weight + pending.weight
    return {name: total / weight for name, (total, weight) in totals.items()}


def of_group(index: int) -> str:
    """The resource of one param group."""
    return f"{GROUPS}/{index}"


def of_hook(hook_id: str) -> str:
    """The resource of one installed hook."""
    return f"{HOOKS}/{hook_id}"


class Revisions:
    """At which edit each resource of a model was last changed by an operator: what its ETag is made of.

    The number of edits only grows within a timeline, so no revision comes twice on one. Workers' edits do not count: they
    would make an operator's edit stale at every step of a scheduler. What was never changed has revision 0.
    """

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        # replaced by each change and never written to: the journal compares it with what it has said
        self.known: Mapping[str, int] = dict(known or {})

    def of(self, resource: str) -> int:
        """The edit that changed a resource last."""
        return self.known.get(resource, 0)

    def note(self, edit: int, *resources: str) -> None:
        """Note that an edit has changed these resources."""
        self.known = {**self.known, **dict.fromkeys(resources, edit)}

    def forget(self, resource: str) -> None:
        """Forget a resource that is gone, and whose name is not given again."""
        self.known = {name: edit for name, edit in self.known.items() if name != resource}
