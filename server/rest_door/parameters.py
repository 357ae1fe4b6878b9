"""Parameters: what they are called, how large they are, what they look like."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

import torch
from fastapi import APIRouter, Query

from pushstep.optim.norms import square_sum
from pushstep.proto import dtypes
from pushstep.proto.layout import Slot

from ..model import Model
from .depends import ModelHere
from .numbers import finite_values
from .queries import Index, Offset

router = APIRouter(tags=["parameters"])
BLOCK: Final = 1 << 20


def _show(slot: Slot, model: Model) -> dict[str, Any]:
    return {
        "name": slot.name,
        "shape": list(slot.shape),
        "dtype": dtypes.NAMES[slot.dtype],
        "group": slot.group,
        "aliases": list(slot.aliases),
        "row_sparse": slot.index in model.arenas.row_changed,
        "steps": model.arenas.steps[slot.index],
    }


@router.get("/models/{m}/parameters", summary="List the parameters")
async def list_parameters(
    model: ModelHere,
    offset: Offset = 0,
    limit: Annotated[Index, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """In manifest order, a page at a time."""
    slots = model.layout.slots
    return {
        "parameters": [_show(slot, model) for slot in slots[offset : offset + limit]],
        "total": len(slots),
    }


@router.get("/models/{m}/parameters/{name:path}", summary="Show a parameter in numbers")
async def show_parameter(model: ModelHere, name: str) -> dict[str, Any]:
    """Statistics of its values and states at one version."""
    slot = model.layout.slot(name, model.name)

    def read() -> dict[str, Any]:
        arenas = model.arenas
        tensors = {"value": arenas.view(slot), **{s: arenas.view(slot, s) for s in arenas.state_names(slot)}}
        return {
            "version": arenas.version,
            "timeline": arenas.timeline,
            "statistics": {name: _statistics(tensor) for name, tensor in tensors.items()},
        }

    return {**_show(slot, model), **await model.stepper.submit(read)}


def _statistics(tensor: torch.Tensor) -> dict[str, float | None]:
    if tensor.numel() == 0:
        return {"min": None, "max": None, "mean": None, "norm": None}
    # block by block: a copy in float64 of a large parameter may find no memory
    total = sum(float(block.sum(dtype=torch.float64)) for block in torch.split(tensor.reshape(-1), BLOCK))
    return finite_values(
        {
            "min": float(tensor.min()),
            "max": float(tensor.max()),
            "mean": total / tensor.numel(),
            "norm": math.sqrt(square_sum(tensor)),
        }
    )
