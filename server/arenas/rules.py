"""The update rules of a layout's groups, and what their states begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from pushstep.optim import RULES, Rule
from pushstep.proto.wire.layout import Layout

# New hyperparameters of a group are tried on this before they are accepted.
TRIED_ELEMENTS: Final = 256
TRIED_GRADIENTS: Final = (0.0, 1.0, -1.0)
TRIED_STEPS: Final = 2


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


def stays_finite(
    layout: Layout,
    parameters: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    steps: Sequence[int],
    group: int,
    values: Mapping[str, float | bool],
) -> bool:
    """True if trial steps with these hyperparameters keep a sample of a group's finite elements finite."""
    rule = rule_of(layout, group)
    for arena in layout.arenas_of_group[group]:
        if not arena.elements:
            continue
        stride = -(-arena.elements // TRIED_ELEMENTS)
        for gradient in TRIED_GRADIENTS:
            flats = [parameters[arena.index], *states[arena.index].values()]
            param, *state = (flat[::stride].clone() for flat in flats)
            was = torch.isfinite(param)
            first = arena.slots[0].index
            for step in range(1, 1 + TRIED_STEPS):
                at = step + (steps[first] if first < len(steps) else 0)
                rule.step_dense(param, torch.full_like(param, gradient), state, values, step=at)
            if bool((was & ~torch.isfinite(param)).any()):
                return False
    return True
