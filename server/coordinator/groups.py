"""Param groups: each has an update rule and the hyperparameters that hold for the next version.

There are three sources of edits, with a fixed precedence, so that edits never compound. The lead worker's edits arrive
with its pushes. An operator's PATCH pins the fields that it names against worker edits, until the operator releases
them. A scheduler hook holds the lr of its groups against both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from pushstep.optim import RULES, Rule
from pushstep.proto.errors import (
    HeldByHook,
    InvalidHyperparameter,
    InvalidManifest,
    SparseNotSupported,
    UnknownGroup,
)
from pushstep.proto.types_pb2 import GroupValues, ParamGroup
from pushstep.proto.wire.hyperparameters import Values, plain_values, wire_values
from pushstep.proto.wire.layout import Slot

from ..staging.gradient import DensePart, RowsPart, StagedPush

# Steps of float32 parameters use float32 hyperparameters: a larger value would make a step fail half way.
LARGEST: Final = torch.finfo(torch.float32).max


# The values of a group, the fields that an operator has pinned, and the hook that holds its lr.
Basis = tuple[Values, set[str], str | None]


@dataclass(slots=True)
class Group:
    """One param group: its rule, its values, and who holds which of them."""

    rule: Rule
    optimizer: int
    # values and pinned: an edit replaces them and never writes to them
    values: Values
    pinned: set[str] = field(default_factory=set)
    # id of the hook that sets lr at every version
    scheduled_by: str | None = None
    # steps leave its parameters and their state as they are
    frozen: bool = False
    # the last message made, and the values that it shows
    _sent: tuple[Values, GroupValues] | None = None

    @classmethod
    def make(cls, group: ParamGroup) -> Group:
        """Make a group from a manifest entry. InvalidManifest or InvalidHyperparameter if it is not valid."""
        rule = RULES.get(group.rule)
        if rule is None:
            raise InvalidManifest(problem=f"unknown rule {group.rule!r}; known are {', '.join(RULES)}")
        made = cls(rule, group.optimizer, dict(rule.defaults))
        made.values = made.changed(plain_values(group.values))
        return made

    def changed(self, edit: Mapping[str, Any], before: Values | None = None) -> Values:
        """The values after `edit`; nothing is written. InvalidHyperparameter if the rule refuses them.

        before: the values to edit, where these are not the group's current ones.
        """
        values = dict(self.values if before is None else before)
        for name, value in edit.items():
            values[name] = self._typed(name, value)
        try:
            self.rule.validate(values)
        except ValueError as error:
            raise InvalidHyperparameter(problem=str(error)) from error
        return values

    def message(self, index: int) -> GroupValues:
        """The current values as a message. It is made once and shared: callers must not write to it."""
        if self._sent is None or self._sent[0] is not self.values or self._sent[1].group != index:
            lr = float(self.values["lr"])
            self._sent = (
                self.values,
                GroupValues(group=index, values=wire_values(self.values), effective_lr=lr),
            )
        return self._sent[1]

    def basis(self) -> Basis:
        """What a plan of edits depends on: the values, and who holds which of them."""
        return self.values, self.pinned, self.scheduled_by

    def is_at(self, basis: Basis) -> bool:
        """True if nothing has replaced the values, or who holds them, since `basis` was taken."""
        values, pinned, scheduled_by = basis
        return self.values is values and self.pinned is pinned and self.scheduled_by == scheduled_by

    def require_name(self, name: str) -> None:
        """InvalidHyperparameter if the rule has no hyperparameter of that name."""
        if name not in self.rule.defaults:
            raise InvalidHyperparameter(
                problem=f"rule {self.rule.name!r} has no hyperparameter {name!r}; it has {', '.join(self.rule.defaults)}"
            )

    def _typed(self, name: str, value: Any) -> float | bool:
        self.require_name(name)
        wants_flag = isinstance(self.rule.defaults[name], bool)
        if wants_flag != isinstance(value, bool) or not isinstance(value, (bool, int, float)):
            kind = "true or false" if wants_flag else "a number"
            raise InvalidHyperparameter(problem=f"{name} must be {kind}, not {value!r}")
        if not abs(value) <= LARGEST:
            raise InvalidHyperparameter(problem=f"{name} must be a finite float32, not {value!r}")
        return value if wants_flag else float(value)


@dataclass(frozen=True, slots=True)
class OperatorEdit:
    """What an operator changes in a group."""

    values: Mapping[str, Any]
    # pins the fields that `values` names against workers' edits, or else frees them
    hold: bool = True
    # None: as it is
    frozen: bool | None = None


@dataclass(frozen=True, slots=True)
class EditPlan:
    """What a worker's edits do to the groups."""

    # the values after them, by group
    planned: Mapping[int, Values]
    # the edits that do not count, of the form "group.name"
    ignored: Sequence[str]
    lead: bool
    # by edited group: what the plan depends on
    basis: Mapping[int, Basis]

    def holds(self, groups: ParamGroups, lead: bool) -> bool:
        """True if the plan would be the same now."""
        return lead == self.lead and all(
            groups.list[index].is_at(basis) for index, basis in self.basis.items()
        )


class ParamGroups:
    """The groups of one model, in order."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.list = list(groups)
        # parameters whose last gradient was row-sparse, by index
        self._by_rows: dict[int, Slot] = {}

    def become(self, others: ParamGroups) -> None:
        """Take over the groups of `others`, in place."""
        self.list[:] = others.list
        self._by_rows.clear()

    def replace(self, others: ParamGroups) -> None:
        """Take over the groups of `others`, which belong to the same parameters as these."""
        self.list[:] = others.list

    def at(self, index: int, model: str) -> Group:
        """The group at an index. UnknownGroup if there is none."""
        if not 0 <= index < len(self.list):
            raise UnknownGroup(model=model, groups=len(self.list), group=index)
        return self.list[index]

    def patched(self, index: int, edit: OperatorEdit, model: str) -> Group:
        """A group as an operator's edit makes it, validated whole; nothing is written.

        HeldByHook if a scheduler hook sets the lr. Raises what `changed` raises.
        """
        group = self.at(index, model)
        if "lr" in edit.values and group.scheduled_by is not None:
            raise HeldByHook(field="lr", group=index, hook=group.scheduled_by)
        values, fields = self.changed(index, edit.values, model), set(edit.values)
        pinned = group.pinned | fields if edit.hold else group.pinned - fields
        frozen = group.frozen if edit.frozen is None else edit.frozen
        return replace(group, values=values, pinned=pinned, frozen=frozen)

    def patch(self, index: int, edit: OperatorEdit, model: str) -> Group:
        """Apply an operator's edit. Raises what `patched` raises, with nothing written."""
        self.list[index] = self.patched(index, edit, model)
        return self.list[index]

    @property
    def frozen(self) -> list[int]:
        """The groups that steps leave as they are."""
        return [index for index, group in enumerate(self.list) if group.frozen]

    def changed(self, index: int, edit: Mapping[str, Any], model: str) -> Values:
        """A group's values after an edit; nothing is written. Every later push must be steppable with them.

        InvalidHyperparameter also if the group's row-sparse gradients cannot be stepped with them. UnknownGroup.
        """
        values = self.at(index, model).changed(edit)
        self.check_rows({index: values})
        return values

    def require_steppable(self, push: StagedPush, planned: Mapping[int, Values]) -> None:
        """SparseNotSupported if a group refuses the rows of a push under the values planned for it."""
        for part in push.parts:
            if isinstance(part, RowsPart):
                group = self.list[part.slot.group]
                try:
                    group.rule.check_rows(planned.get(part.slot.group, group.values))
                except RuntimeError as error:
                    raise SparseNotSupported(parameter=part.slot.name, problem=str(error)) from error

    def check_rows(self, planned: Mapping[int, Values]) -> None:
        """InvalidHyperparameter if the planned values cannot step a group's row-sparse gradients."""
        for slot in self._by_rows.values():
            if slot.group in planned:
                try:
                    self.list[slot.group].rule.check_rows(planned[slot.group])
                except RuntimeError as error:
                    raise InvalidHyperparameter(
                        problem=f"{error}, and the last gradient of {slot.name!r} was row-sparse"
                    ) from error

    def note_rows(self, parts: Sequence[DensePart | RowsPart]) -> None:
        """Remember which parameters are stepped by rows, until their next dense gradient."""
        for part in parts:
            if isinstance(part, RowsPart):
                self._by_rows[part.slot.index] = part.slot
            elif self._by_rows:
                first, last = part.slots[0].index, part.slots[-1].index
                for index in [index for index in self._by_rows if first <= index <= last]:
                    del self._by_rows[index]

    def plan(
        self,
        edits: Mapping[int, Mapping[str, Any]],
        lead: bool,
        model: str,
        before: Mapping[int, Values] | None = None,
    ) -> EditPlan:
        """What a worker's edits do to the groups. Writes nothing.

        Only the lead's edits count, and no edit of a held field does. before: the values that a round's earlier pushes
        have planned already. Raises UnknownGroup or InvalidHyperparameter.
        """
        planned: dict[int, Values] = dict(before or {})
        ignored: list[str] = []
        for index, edit in edits.items():
            group = self.at(index, model)
            counted = {}
            for name, value in edit.items():
                group.require_name(name)  # also for edits that do not count: their names go into the receipt
                held = name in group.pinned or (name == "lr" and group.scheduled_by is not None)
                if lead and not held:
                    counted[name] = value
                else:
                    ignored.append(f"{index}.{name}")
            if counted:
                planned[index] = group.changed(counted, planned.get(index))
        return EditPlan(planned, ignored, lead, {index: self.list[index].basis() for index in edits})

    def write(self, planned: Mapping[int, Values]) -> None:
        """Write what `plan` planned."""
        for index, values in planned.items():
            self.list[index].values = values

    def messages(self) -> list[GroupValues]:
        """Every group's current values as messages. Callers must not write to them."""
        return [group.message(index) for index, group in enumerate(self.list)]

    def dump(self) -> list[dict[str, Any]]:
        """The groups as JSON, which shares no object with them."""
        return [
            {
                "rule": group.rule.name,
                "optimizer": group.optimizer,
                "values": dict(group.values),
                "pinned": sorted(group.pinned),
                "frozen": group.frozen,
            }
            for group in self.list
        ]

    @classmethod
    def parse(cls, dumped: Iterable[Mapping[str, Any]]) -> ParamGroups:
        """The groups that `dump` wrote."""
        return cls(
            Group(
                RULES[entry["rule"]],
                int(entry["optimizer"]),
                dict(entry["values"]),
                set(entry["pinned"]),
                frozen=entry.get("frozen", False),
            )
            for entry in dumped
        )
