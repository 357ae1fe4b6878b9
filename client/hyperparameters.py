"""The hyperparameters of the groups here, and what they are known to be on the server.

A hyperparameter is the server's. Whatever differs here from what was last known is an edit, of the user or of a
scheduler, that the next push carries; what comes back is written into the groups, in place where they hold tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushstep.optim import RULES
from pushstep.proto.hyperparameters import values_of
from pushstep.proto.types_pb2 import GroupValues

from . import caller
from .receipt import Receipt


@dataclass(frozen=True, slots=True)
class Group:
    """One param group here: torch's own dict of it, its rule, and the number of the optimizer that it is of."""

    settings: dict[str, Any]
    rule: str
    optimizer: int

    def values(self) -> dict[str, float | bool]:
        """Its hyperparameters as numbers; keys that its rule does not have are this side's own."""
        defaults = RULES[self.rule].defaults
        values = {name: self.settings[name] for name in defaults if name in self.settings}
        if values.get("weight_decay", 0.0) is None:  # Keras's word for a decay of 0
            values["weight_decay"] = 0.0
        return {
            name: bool(value) if isinstance(defaults[name], bool) else float(value)
            for name, value in values.items()
        }


class Hyperparameters:
    """The groups' values as last known, and whether this worker's edits of them count: the lead's do."""

    def __init__(self) -> None:
        self.leads = False
        self._known: list[dict[str, float | bool]] = []
        self._warned = False

    def edits(self, groups: Sequence[Group]) -> dict[int, dict[str, float | bool]]:
        """What was changed here since, by the group's index."""
        edits = {}
        # a group that could not be added here may be known all the same
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
        """The edits that the next push will carry and that, as far as the last receipt tells, will count."""
        ignored = receipt.ignored_edits if receipt is not None else ()
        edits = self.edits(groups) if self.leads else {}
        return {
            index: {name: value for name, value in changed.items() if f"{index}.{name}" not in ignored}
            for index, changed in edits.items()
        }

    def write(
        self,
        groups: Sequence[Group],
        values: Iterable[GroupValues],
        since: Sequence[Mapping[str, float | bool]] = (),
    ) -> None:
        """Have the groups hold the server's values.

        `since`: the groups' values when the push was made whose answer this is. What was changed here after that
        stays as it is: it travels with the next push.
        """
        later = [
            {name: group.settings[name] for name in old if not _same(group.settings[name], old[name])}
            for group, old in zip(groups, since, strict=False)
        ]
        # a group that another worker has added meanwhile is not this one's yet
        self._known = [values_of(group) for group in values][: len(groups)]
        for number, (group, known) in enumerate(zip(groups, self._known, strict=True)):
            for name, value in known.items():
                if number < len(later) and name in later[number]:
                    continue
                if isinstance(group.settings.get(name), Tensor):
                    group.settings[name].fill_(value)
                elif group.settings.get(name) != value:
                    group.settings[name] = value

    def copies(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """The groups' settings as they are, less their parameters."""
        return [
            {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in group.settings.items()
                if name != "params"
            }
            for group in groups
        ]

    def put_back(self, groups: Sequence[Group], copies: Sequence[Mapping[str, Any]]) -> None:
        """Have the groups what `copies` gave, in place where they hold tensors."""
        for group, copied in zip(groups, copies, strict=True):
            for name, value in copied.items():
                if isinstance(value, Tensor) and isinstance(group.settings.get(name), Tensor):
                    group.settings[name].copy_(value)
                else:
                    group.settings[name] = value

    def unsent(self, groups: Sequence[Group]) -> dict[int, dict[str, float | bool]]:
        """The lead's edits that no push has carried, for the leave to carry; those that are no numbers stay here."""
        try:
            return self.edits(groups) if self.leads else {}
        except (TypeError, ValueError, RuntimeError) as error:
            caller.warn(f"the last edits of the hyperparameters are lost: {error}")
            return {}

    def warn_ignored(self, receipt: Receipt) -> None:
        """Say once that edits did not count, to the caller of the optimizer's `step`."""
        why = "an operator or a hook holds them" if receipt.lead else "only the lead worker's count"
        self._warn(receipt.ignored_edits, why)

    def warn_ignored_at_leave(self, ignored: Sequence[str]) -> None:
        """The same of those that the leave has carried."""
        self._warn(
            ignored, "an operator or a hook holds them, their rule refuses them, or a restore came first"
        )

    def _warn(self, ignored: Sequence[str], why: str) -> None:
        if ignored and not self._warned:
            self._warned = True
            caller.warn(f"hyperparameter edits of this worker were ignored ({', '.join(ignored)}): {why}")


def _same(value: Any, known: float | bool) -> bool:
    """Whether a group's value is `known`; of a tensor, whether it is what `known` becomes in its dtype."""
    if isinstance(value, Tensor):
        return bool(value == torch.full_like(value, known))
    return bool(value == known)
