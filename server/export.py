"""Checkpoints out: a model at one version as one file that other programs load.

`safetensors` holds the parameters by name. `torch` is a torch.save of {"model": {name: tensor}, "optimizer":
torch's state_dict, or a list of them} that plain torch loads with weights_only=True. All exports of a version share
one copy of it; of two versions at once, others wait.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pushstep.optim.state_dict import GroupState, ParameterState, torch_state_dict
from pushstep.proto.errors import ExportsBusy, StorageFailed, UnsupportedFormat

from .arena import ArenasCopy
from .files import reason
from .hooks.hook import Point
from .model import Model
from .snapshots import EXPORT_PREFIX

FORMATS: Final = ("safetensors", "torch")
COPIES_AT_ONCE: Final = 2
RETRY_AFTER_S: Final = 1.0


@dataclass(slots=True)
class _Shared:
    copy: asyncio.Task[tuple[dict[str, Any], ArenasCopy]]
    readers: int = 0


class Exports:
    """The copies that exports are being made from, by model and version."""

    def __init__(self) -> None:
        self._shared: dict[tuple[bytes, int, int, int], _Shared] = {}

    @asynccontextmanager
    async def copy_of(self, model: Model) -> AsyncIterator[tuple[dict[str, Any], ArenasCopy]]:
        """The model at its version of now, shared with whoever exports the same one. ExportsBusy beyond two."""
        model.require_whole()
        key = (model.uid, model.timeline, model.version, model.edit)
        shared = self._shared.get(key)
        if shared is None:
            if len(self._shared) >= COPIES_AT_ONCE:
                raise ExportsBusy(count=len(self._shared), retry_after_s=RETRY_AFTER_S)
            model.tell(Point.STATE_DICT_PRE)
            shared = self._shared[key] = _Shared(asyncio.ensure_future(model.copy()))
        shared.readers += 1
        try:
            yield await asyncio.shield(shared.copy)
            model.tell(Point.STATE_DICT_POST)
        finally:
            shared.readers -= 1
            if shared.readers == 0:
                self._shared.pop(key, None)


def check_format(name: str) -> str:
    """`name`, or UnsupportedFormat."""
    if name not in FORMATS:
        raise UnsupportedFormat(got=name, known=", ".join(FORMATS))
    return name


def optimizer_state(facts: Mapping[str, Any], copy: ArenasCopy) -> dict[str, Any] | list[dict[str, Any]]:
    """torch's state_dict of the model's optimizer, or a list of them in order if it has several."""
    groups = [GroupState(entry["rule"], entry["values"]) for entry in facts["groups"]]
    for slot in copy.layout.slots:
        names = copy.states[slot.arena].keys()
        tensors = {name: copy.view(slot, name) for name in names}
        groups[slot.group].parameters.append(ParameterState(copy.steps[slot.index], tensors))
    by_optimizer: dict[int, list[GroupState]] = {}
    for entry, group in zip(facts["groups"], groups, strict=True):
        by_optimizer.setdefault(entry["optimizer"], []).append(group)
    dicts = [torch_state_dict(by_optimizer[index]) for index in sorted(by_optimizer)]
    return dicts[0] if len(dicts) == 1 else dicts


def parameters_by_name(copy: ArenasCopy) -> dict[str, torch.Tensor]:
    """Every parameter by name and alias, and the module's buffers and frozen values: what load_state_dict takes."""
    return {
        **copy.extras,
        **{
            name: copy.view(slot).clone() for slot in copy.layout.slots for name in (slot.name, *slot.aliases)
        },
    }


def write(facts: Mapping[str, Any], copy: ArenasCopy, form: str, folder: Path) -> Path:
    """Write a checkpoint into a temporary file, which the caller deletes."""
    descriptor, name = tempfile.mkstemp(prefix=EXPORT_PREFIX, dir=folder)
    os.close(descriptor)
    path = Path(name)
    try:
        if form == "safetensors":
            labels = {key: str(facts[key]) for key in ("model", "uid", "timeline", "version")}
            save_file(parameters_by_name(copy), path, metadata={"format": "pt", **labels})
        else:
            optimizer = optimizer_state(facts, copy)
            torch.save({"model": parameters_by_name(copy), "optimizer": optimizer}, path)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # RuntimeError: torch's word for a disk that refuses
        path.unlink(missing_ok=True)
        raise StorageFailed(path=path, problem=reason(error)) from error
    return path


def describe_state(facts: Mapping[str, Any], copy: ArenasCopy) -> list[dict[str, Any]]:
    """The state_dict without its tensors: per optimizer the groups, and each parameter's steps, shapes and norms."""
    dicts = optimizer_state(facts, copy)
    return [
        {
            "param_groups": optimizer["param_groups"],
            "state": {
                str(number): {name: _describe(name, tensor) for name, tensor in state.items()}
                for number, state in optimizer["state"].items()
            },
        }
        for optimizer in (dicts if isinstance(dicts, list) else [dicts])
    ]


def _describe(name: str, tensor: torch.Tensor) -> float | dict[str, Any]:
    if name == "step":
        return float(tensor)
    norm = float(torch.linalg.vector_norm(tensor.double()))
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": norm if math.isfinite(norm) else None,
    }
