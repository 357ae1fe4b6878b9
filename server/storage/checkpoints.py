"""Exports checkpoints: a model at one version as one file that other programs load.

`safetensors` holds the parameters by name, and the optimizer's state if that is asked for (`proto/wire/tensor_names.py`). `torch` is a torch.save of {"model": {name: tensor}, "optimizer":
torch's state_dict, or a list of them} that plain torch loads with weights_only=True. Tied weights are there under each
of their names: stored once in a torch file, and once per name in safetensors, which cannot share. No tensor is copied on
the way. The file has no name by the time it is sent, so nothing of it is left however its download or this process ends.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch
import xxhash
from torch import Tensor

from pushstep.optim.ops.norms import square_sum
from pushstep.optim.state_dict import GroupState, ParameterState, torch_state_dict
from pushstep.proto.errors import UnknownHook, UnsupportedFormat
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.tensor_names import GROUPS

from ..arenas.arenas_copy import ArenasCopy
from . import files
from .file_content import groups_text, states_by_name
from .snapshots import EXPORT_PREFIX
from .tensor_file import write_tensors

FORMATS: Final = ("safetensors", "torch")
READ_BYTES: Final = 1 << 20


class Needs(NamedTuple):
    """What a checkpoint is made of, beside the parameters."""

    state: bool
    average: str


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint holds: its format, and whether a safetensors file has the optimizer's state, too.

    average: the hook whose averages are there in place of the parameters that it averages; empty: none.
    """

    format: str
    state: bool
    average: str = ""

    def __post_init__(self) -> None:
        """UnsupportedFormat for an unknown format."""
        if self.format not in FORMATS:
            raise UnsupportedFormat(got=self.format, known=", ".join(FORMATS))

    @property
    def needs(self) -> Needs:
        """What it is made of."""
        return Needs(self.state or self.format == "torch", self.average)


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A written checkpoint: an open file that no folder lists any more, and the version that it holds."""

    file: BinaryIO
    size_bytes: int
    # a strong ETag: a digest of the file's bytes
    etag: str
    version: int
    timeline: int
    _sha256: bytes | None = None

    def sha256(self) -> bytes:
        """The SHA-256 of the file, which takes a pass over it: 0.4 to 2 GB/s. It blocks."""
        if self._sha256 is None:
            digest, at = hashlib.sha256(), 0
            while block := os.pread(self.file.fileno(), READ_BYTES, at):
                digest.update(block)
                at += len(block)
            self._sha256 = digest.digest()
        return self._sha256

    def close(self) -> None:
        """Close the file, which frees its room on the disk."""
        self.file.close()


def optimizer_state(
    facts: Mapping[str, Any], copy: ArenasCopy, take: Callable[[Tensor], Tensor]
) -> dict[str, Any] | list[dict[str, Any]]:
    """torch's state_dict of the model's optimizer, or a list of them in order if it has several.

    `take` makes each tensor of the state_dict from a view of the copy.
    """
    groups = [GroupState(entry["rule"], entry["values"]) for entry in facts["groups"]]
    for slot in copy.layout.slots:
        names = copy.states[slot.arena].keys()
        tensors = {name: copy.view(slot, name) for name in names}
        groups[slot.group].parameters.append(ParameterState(copy.steps[slot.index], tensors))
    by_optimizer: dict[int, list[GroupState]] = {}
    for entry, group in zip(facts["groups"], groups, strict=True):
        by_optimizer.setdefault(entry["optimizer"], []).append(group)
    dicts = [torch_state_dict(by_optimizer[index], take) for index in sorted(by_optimizer)]
    return dicts[0] if len(dicts) == 1 else dicts


def parameters_by_name(copy: ArenasCopy) -> dict[str, Tensor]:
    """Every parameter by name and alias, and the module's buffers and frozen values, for load_state_dict."""
    found = {name: _by_itself(extra) for name, extra in copy.extras.items()}
    for slot in copy.layout.slots:
        found |= dict.fromkeys((slot.name, *slot.aliases), _by_itself(copy.view(slot)))
    return found


def labels_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a safetensors checkpoint says of itself."""
    return {"format": "pt", **{key: str(facts[key]) for key in ("model", "timeline", "uid", "version")}}


def _by_itself(view: Tensor) -> Tensor:
    """The same elements in the same place, with a storage of their own: torch.save writes whole storages."""
    if not view.numel():
        return torch.empty(view.shape, dtype=view.dtype, device="cpu")
    memory = torch.from_numpy(view.reshape(-1).view(torch.uint8).numpy())
    return memory.view(view.dtype).view(view.shape)


def averaged(facts: Mapping[str, Any], copy: ArenasCopy, hook: str) -> ArenasCopy:
    """The copy with a hook's averages as its parameters, in their dtypes. UnknownHook if that keeps none."""
    averages = copy.averages.get(hook)
    if averages is None:
        raise UnknownHook(model=facts["model"], hook=hook[:200])
    parameters = [
        averages[index].to(flat.dtype) if index in averages else flat
        for index, flat in enumerate(copy.parameters)
    ]
    return replace(copy, parameters=parameters)


def write(facts: Mapping[str, Any], copy: ArenasCopy, content: Content, folder: Path) -> Checkpoint:
    """Write a checkpoint in `folder`. StorageFailed, OutOfMemory, InvalidManifest, UnknownHook."""
    if content.average:
        copy = averaged(facts, copy, content.average)
    tensors = parameters_by_name(copy)
    of_torch = content.format == "torch"
    optimizer = optimizer_state(facts, copy, _by_itself) if of_torch else None
    if content.state and not of_torch:
        tensors |= states_by_name(copy, tensors)
    need_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if of_torch:
        need_bytes += sum(tensor.nbytes for states in copy.states for tensor in states.values())
    try:
        # torch writes the file's name into the file: with a constant name, equal checkpoints have equal bytes
        with tempfile.TemporaryDirectory(prefix=EXPORT_PREFIX, dir=folder) as own:
            path = Path(own) / "checkpoint"
            if of_torch:
                try:
                    torch.save({"model": tensors, "optimizer": optimizer}, path)
                except RuntimeError as error:  # torch raises it if the disk refuses
                    raise files.asked(path, need_bytes, error) from error
            else:
                labels = {**labels_of(facts), GROUPS: groups_text(copy.layout, facts["groups"])}
                write_tensors(path, tensors, labels)
            return _opened(path, copy)
    except OSError as error:
        raise files.refusal("the checkpoint", error, folder, need_bytes) from error


def _opened(path: Path, copy: ArenasCopy) -> Checkpoint:
    file = path.open("rb")
    try:
        digest = xxhash.xxh3_128()
        while block := file.read(READ_BYTES):
            digest.update(block)
        return Checkpoint(file, file.tell(), f'"{digest.hexdigest()}"', copy.version, copy.timeline)
    except BaseException:
        file.close()
        raise


def describe_state(facts: Mapping[str, Any], copy: ArenasCopy) -> list[dict[str, Any]]:
    """The state_dicts without tensors: the groups, and each parameter's steps, shapes and norms."""
    dicts = optimizer_state(facts, copy, lambda tensor: tensor)
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


def _describe(name: str, tensor: Tensor) -> float | dict[str, Any]:
    if name == "step":
        return float(tensor)
    norm = math.sqrt(square_sum(tensor))
    return {
        "shape": list(tensor.shape),
        "dtype": dtypes.name_of(tensor.dtype),
        "norm": norm if math.isfinite(norm) else None,
    }
