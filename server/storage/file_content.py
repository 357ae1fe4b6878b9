"""What an export as safetensors has beside the parameters: optimizer state, and the groups in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pushstep.proto.errors import InvalidManifest
from pushstep.proto.wire.layout import Layout, Slot
from pushstep.proto.wire.tensor_names import STEP, state_name

from ..arenas.arenas_copy import ArenasCopy


def states_by_name(copy: ArenasCopy, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter's states and count of steps by their names in a file.

    InvalidManifest if a parameter or buffer, one of `taken`, has such a name.
    """
    found: dict[str, Tensor] = {}
    for slot in copy.layout.slots:
        for state in copy.states[slot.arena]:
            found[state_name(state, slot.name)] = copy.view(slot, state)
        steps = torch.tensor(copy.steps[slot.index], dtype=torch.int64, device="cpu")
        found[state_name(STEP, slot.name)] = steps
    if not taken.keys().isdisjoint(found):
        name = min(taken.keys() & found.keys())
        raise InvalidManifest(
            problem=f"{name[:100]!r} is the name of a parameter and of a state; export weights only, or for torch"
        )
    return found


def groups_text(layout: Layout, groups: list[Mapping[str, Any]]) -> str:
    """The param groups, as snapshots have them, as the metadata of a file."""
    params: list[list[str | list[str]]] = [[] for _ in groups]
    for slot in layout.slots:
        params[slot.group].append(_names(slot))
    return json.dumps(
        [
            {"rule": group["rule"], "optimizer": group["optimizer"], **group["values"], "params": names}
            for group, names in zip(groups, params, strict=True)
        ]
    )


def _names(slot: Slot) -> str | list[str]:
    return [slot.name, *slot.aliases] if slot.aliases else slot.name
