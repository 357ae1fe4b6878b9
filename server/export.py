"""Checkpoints out: a model at one version as one file that other programs load.

`safetensors` holds the parameters by name. `torch` is a torch.save of {"model": {name: tensor}, "optimizer":
torch's state_dict, or a list of them} that plain torch loads with weights_only=True. All exports of a version share
one copy of it; of two versions at once, others wait. The file has no name by the time it is sent: however its download
ends, or this process, nothing of it is left.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pushstep.optim.norms import square_sum
from pushstep.optim.state_dict import GroupState, ParameterState, torch_state_dict
from pushstep.proto.errors import ExportsBusy, UnsupportedFormat

from . import files
from .arena import ArenasCopy
from .hooks.hook import Point
from .memory import copy_of
from .model import Model
from .snapshots import EXPORT_PREFIX

FORMATS: Final = ("safetensors", "torch")
COPIES_AT_ONCE: Final = 2
RETRY_AFTER_S: Final = 1.0
READ_BYTES: Final = 8 << 20
PINS_KEPT: Final = 10_000


@dataclass(slots=True)
class _Shared:
    copy: asyncio.Task[tuple[dict[str, Any], ArenasCopy]]
    readers: int = 0


class Exports:
    """The copies that exports are being made from, by model and version."""

    def __init__(self) -> None:
        self.pins = Pins()
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A written checkpoint: an open file that no folder lists any more."""

    file: BinaryIO
    size_bytes: int
    # of its bytes, so strong: equal for no others
    etag: str

    def close(self) -> None:
        """Let go of it: its room on the disk is free then."""
        self.file.close()


class Pins:
    """What was sent under the name of a version: whoever asks for the rest of it is to get the rest of that.

    A version's number alone does not say what a file holds: groups and buffers change between versions, and numbers
    come again on another timeline or in another model of the name.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[object, ...], str] = {}

    def note(self, name: tuple[object, ...], etag: str) -> str | None:
        """What was sent under this name until now: the ETag of the only thing, "" for several, None for nothing."""
        known = self._sent.pop(name, None)
        self._sent[name] = etag if known in (None, etag) else ""
        if len(self._sent) > PINS_KEPT:
            del self._sent[next(iter(self._sent))]
        return known


def optimizer_state(
    facts: Mapping[str, Any], copy: ArenasCopy, take: Callable[[Tensor], Tensor]
) -> dict[str, Any] | list[dict[str, Any]]:
    """torch's state_dict of the model's optimizer, or a list of them in order if it has several.

    `take` makes each tensor of what lies in the copy.
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


def parameters_by_name(copy: ArenasCopy, take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Every parameter by name and alias, and the module's buffers and frozen values: what load_state_dict takes."""
    return {
        **copy.extras,
        **{name: take(copy.view(slot)) for slot in copy.layout.slots for name in (slot.name, *slot.aliases)},
    }


def _own(tensor: Tensor) -> Tensor:
    """torch writes the whole storage of what it is given, of which a parameter is a part."""
    return copy_of(tensor, "a checkpoint")


def write(facts: Mapping[str, Any], copy: ArenasCopy, form: str, folder: Path) -> Checkpoint:
    """Write a checkpoint. StorageFailed, OutOfMemory."""
    parameters = parameters_by_name(copy, _own)
    tensors = list(parameters.values())
    optimizer = None if form == "safetensors" else optimizer_state(facts, copy, _own)
    if optimizer is not None:
        tensors += [tensor for states in copy.states for tensor in states.values()]
    need_bytes = sum(tensor.nbytes for tensor in tensors)
    try:
        # torch writes the file's name into it: it is the same each time, as all its bytes are then
        with tempfile.TemporaryDirectory(prefix=EXPORT_PREFIX, dir=folder) as own:
            path = Path(own) / "checkpoint"
            try:
                if optimizer is None:
                    labels = {key: str(facts[key]) for key in ("model", "uid", "timeline", "version")}
                    save_file(parameters, path, metadata={"format": "pt", **labels})
                    _order_labels(path)
                else:
                    torch.save({"model": parameters, "optimizer": optimizer}, path)
            except (RuntimeError, SafetensorError) as error:  # torch's word for a disk that refuses
                raise files.asked(path, need_bytes, error) from error
            return _opened(path)
    except OSError as error:
        raise files.refusal("the checkpoint", error, folder, need_bytes) from error


def _order_labels(path: Path) -> None:
    """Write a file's labels in the order of their names: safetensors has them in any, and no two files are equal."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def _opened(path: Path) -> Checkpoint:
    file = path.open("rb")
    try:
        digest = xxhash.xxh3_128()
        while block := file.read(READ_BYTES):
            digest.update(block)
        return Checkpoint(file, file.tell(), f'"{digest.hexdigest()}"')
    except BaseException:
        file.close()
        raise


def describe_state(facts: Mapping[str, Any], copy: ArenasCopy) -> list[dict[str, Any]]:
    """The state_dict without its tensors: per optimizer the groups, and each parameter's steps, shapes and norms."""
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
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": norm if math.isfinite(norm) else None,
    }
