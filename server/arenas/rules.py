"""The update rules of a layout's groups, and what their states begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pushstep.optim import RULES, Rule
from pushstep.proto.wire.layout import Layout


def rule_of(layout: Layout, group: int) -> Rule:
    """The update rule of a group."""
    return RULES[layout.manifest.groups[group].rule]


def fill_initial(
    layout: Layout,
    states: Sequence[Mapping[str, Tensor]],
    values: Sequence[Mapping[str, float | bool]],
    first: int,
) -> None:
    """Fill the states of the arenas from `first` on with their rules' initial values."""
    for arena in layout.arenas[first:]:
        rule = rule_of(layout, arena.group)
        for name, flat in states[arena.index].items():
            flat.fill_(rule.initial_value(name, values[arena.group]))
