"""The hyperparameters of the local groups, and their last known values on the server.

The server owns the hyperparameters. A local value that differs from the last known one is an edit, by the user or by a
scheduler, and the next push carries it. The answer's values are written into the groups, in place if they hold tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from pushstep.optim import RULES
from pushstep.proto.types_pb2 import GroupValues
from pushstep.proto.wire.hyperparameters import values_of

from ..membership.receipt import Receipt
from ..warn import warn

# By rule: reads all its hyperparameters from a param group at once. KeyError if the group lacks one.
_READERS: Final[Mapping[str, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    name: itemgetter(*rule.defaults) for name, rule in RULES.items()
}
# Values that only assignment can change, so the same object is the same value.
_IMMUTABLE: Final = frozenset((float, int, bool, type(None)))


@dataclass(frozen=True, slots=True)
class Group:
    """A local param group: torch's own dict of it, the name of its rule, and the number of its optimizer."""

    settings: dict[str, Any]
    rule: str
    optimizer: int

    def values(self) -> dict[str, float | bool]:
        """Return the rule's hyperparameters as numbers, without the group's other keys.

        Raises TypeError, ValueError or RuntimeError for a value that is no number.
        """
        defaults = RULES[self.rule].defaults
        values = {name: self.settings[name] for name in defaults if name in self.settings}
        if values.get("weight_decay", 0.0) is None:  # Keras writes None for no decay
            values["weight_decay"] = 0.0
        return {
            name: bool(value) if isinstance(defaults[name], bool) else float(value)
            for name, value in values.items()
        }


class Hyperparameters:
    """Owns the groups' last known values. `leads`: this worker is the lead, whose edits count."""

    def __init__(self) -> None:
        self.leads = False
        self._known: list[dict[str, float | bool]] = []
        # the server's values as they came, and the groups' objects that were found equal to them
        self._messages: list[bytes] = []
        self._equal: list[tuple[Any, ...]] = []
        self._warned = False

    def edits(self, groups: Sequence[Group]) -> dict[int, dict[str, float | bool]]:
        """Return the local changes to the last known values, by group index."""
        if self._are_unchanged(groups):
            return {}
        edits = self._compared(groups)
        objects = [] if edits else [_objects_of(group) for group in groups]
        self._equal = objects if all(_IMMUTABLE.issuperset(map(type, each)) for each in objects) else []
        return edits

    def _are_unchanged(self, groups: Sequence[Group]) -> bool:
        """True if every hyperparameter is the object that was found equal to the server's value."""
        if not self._equal or len(groups) != len(self._equal):
            return False
        for group, known in zip(groups, self._equal, strict=True):
            if not all(map(is_, _objects_of(group), known)):
                return False
        return True

    def _compared(self, groups: Sequence[Group]) -> dict[int, dict[str, float | bool]]:
        edits = {}
        # not strict: the server may know a group whose adding failed here
        for index, (group, known) in enumerate(zip(groups, self._known, strict=False)):
            changed = {
                name: value
                for name, value in group.values().items()
                if not _same(group.settings[name], known.get(name, math.nan))
            }
            if changed:
                edits[index] = changed
        return edits

    def pending(self, groups: Sequence[Group], receipt: Receipt | None) -> dict[int, dict[str, float | bool]]:
        """Return the edits that the next push carries, less those that the last receipt lists as ignored."""
        ignored = receipt.ignored_edits if receipt is not None else ()
        edits = self.edits(groups) if self.leads else {}
        return {
            index: {name: value for name, value in changed.items() if f"{index}.{name}" not in ignored}
            for index, changed in edits.items()
        }

    def write(
        self,
        groups: Sequence[Group],
        values: Sequence[GroupValues],
        since: Sequence[Mapping[str, float | bool]] = (),
    ) -> None:
        """Write the server's values into the groups.

        `since`: the groups' values when the push of this answer was made. Values that were changed after that stay, and
        travel with the next push.
        """
        messages = [group.SerializeToString(deterministic=True) for group in values]
        if messages == self._messages and not since and self._are_unchanged(groups):
            return
        later = [
            {name: group.settings[name] for name in old if not _same(group.settings[name], old[name])}
            for group, old in zip(groups, since, strict=False)
        ]
        # another worker may have added a group that this one does not have yet
        self._known = [values_of(group) for group in values][: len(groups)]
        self._messages, self._equal = messages, []
        for number, (group, known) in enumerate(zip(groups, self._known, strict=True)):
            for name, value in known.items():
                if number < len(later) and name in later[number]:
                    continue
                if isinstance(group.settings.get(name), Tensor):
                    group.settings[name].fill_(value)
                elif group.settings.get(name) != value:
                    group.settings[name] = value

    def write_around_edits(self, groups: Sequence[Group], values: Sequence[GroupValues]) -> None:
        """Write the server's values where this worker has changed none, after a push that was not applied.

        Its edits stay differences, and travel with the next push.
        """
        self.write(groups, values, self._known)

    def copies(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Return copies of the groups' settings, without their parameters."""
        return [
            {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in group.settings.items()
                if name != "params"
            }
            for group in groups
        ]

    def put_back(self, groups: Sequence[Group], copies: Sequence[Mapping[str, Any]]) -> None:
        """Write what `copies` returned back into the groups, in place if they hold tensors."""
        for group, copied in zip(groups, copies, strict=True):
            for name, value in copied.items():
                if isinstance(value, Tensor) and isinstance(group.settings.get(name), Tensor):
                    group.settings[name].copy_(value)
                else:
                    group.settings[name] = value

    def unsent(self, groups: Sequence[Group]) -> dict[int, dict[str, float | bool]]:
        """Return the lead's edits that no push has carried. If a value is no number, warn and return none."""
        try:
            return self.edits(groups) if self.leads else {}
        except (TypeError, ValueError, RuntimeError) as error:
            warn(f"the last edits of the hyperparameters are lost: {error}")
            return {}

    def warn_ignored(self, receipt: Receipt) -> None:
        """Warn, once, of edits that a push carried and the server ignored."""
        why = (
            "an operator or a hook holds them: `pushstep groups` shows which"
            if receipt.lead
            else "only the lead worker's count, so that the schedulers of n workers step once; nothing has to be done"
        )
        self._warn(receipt.ignored_edits, why)

    def warn_ignored_at_leave(self, ignored: Sequence[str]) -> None:
        """Warn, once, of edits that the leave carried and the server ignored."""
        self._warn(
            ignored, "an operator or a hook holds them, their rule refuses them, or a restore came first"
        )

    def _warn(self, ignored: Sequence[str], why: str) -> None:
        if ignored and not self._warned:
            self._warned = True
            warn(f"hyperparameter edits of this worker were ignored ({', '.join(ignored)}): {why}")


def _objects_of(group: Group) -> tuple[Any, ...]:
    """Return the objects of a group's hyperparameters; (...,), which equals none, if it lacks one."""
    try:
        return _READERS[group.rule](group.settings)
    except KeyError:
        return (...,)


def _same(value: Any, known: float | bool) -> bool:
    """True if a group's value equals `known`; a tensor is compared with `known` rounded to its dtype."""
    if isinstance(value, Tensor):
        return bool(value == torch.full_like(value, known))
    return bool(value == known)
