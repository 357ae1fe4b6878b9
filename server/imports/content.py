"""What a file holds for a model: values, optimizer state, buffers. All of it is checked before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from pushstep.proto.errors import (
    InvalidFile,
    NonfiniteParameter,
    NumberOutOfRange,
    UnknownParameter,
    WrongDtype,
    WrongShape,
)
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout, Slot
from pushstep.proto.wire.tensor_names import STEP, state_name, state_of

from ..arenas.arena import Arenas
from ..arenas.arenas_copy import ArenasCopy
from ..arenas.rules import rule_of
from ..coordinator.settings import LARGEST_WHOLE
from ..staging.inspect import require_accumulated
from ..storage.tensor_file import LONGEST_HEADER_BYTES, tensors_and_metadata

NAMES_SHOWN: Final = 5
SHOWN: Final = 100


@dataclass(slots=True)
class FileContent:
    """A file's tensors, by what they are. Each lies in the file's own memory."""

    values: dict[int, Tensor] = field(default_factory=dict)
    # by parameter: its states by name, and the steps that it has taken
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def fill(
        self,
        arenas: Arenas | ArenasCopy,
        groups: Sequence[Mapping[str, Any]],
        *,
        keeps_state: bool,
    ) -> None:
        """Write everything into arenas. If the file has no state, the state begins anew, or stays as it is with `keeps_state`.

        groups: the hyperparameters of all groups.
        """
        for slot in arenas.layout.slots:
            if slot.index not in self.values:
                continue
            arenas.view(slot).copy_(self.values[slot.index])
            if self.states:
                for name, state in self.states[slot.index].items():
                    arenas.view(slot, name).copy_(state)
                arenas.steps[slot.index] = self.steps[slot.index]
            elif not keeps_state:
                rule = rule_of(arenas.layout, slot.group)
                for name in rule.state_names:
                    arenas.view(slot, name).fill_(rule.initial_value(name, groups[slot.group]))
                arenas.steps[slot.index] = 0


def read_file(
    memory: Tensor, longest_header_bytes: int = LONGEST_HEADER_BYTES
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and texts of a safetensors file. InvalidFile if it is none."""
    try:
        return tensors_and_metadata(memory, longest_header_bytes)
    except ValueError as error:
        raise InvalidFile(problem=f"it is no safetensors file: {error}") from error


def header_limit(layout: Layout) -> int:
    """The most bytes of the header of a file for this model: a name is in it for the values, the steps and each state."""
    entries = 2 + max(len(rule_of(layout, group).state_names) for group in layout.arenas_of_group)
    names = (name for slot in layout.slots for name in (slot.name, *slot.aliases))
    return max(LONGEST_HEADER_BYTES, entries * sum(2 * len(name) + 150 for name in names))


class Sorting:
    """Sorts the tensors of one file by what they are to one model."""

    def __init__(self, layout: Layout, model: str, extras: Mapping[str, Tensor] | None) -> None:
        """`extras`: the model's buffers. None, for a new model: each tensor that belongs to no parameter becomes a buffer."""
        self._layout = layout
        self._model = model
        self._extras = extras
        self._slots = {name: slot for slot in layout.slots for name in (slot.name, *slot.aliases)}

    def sorted(self, tensors: Mapping[str, Tensor], *, partial: bool, weights_only: bool) -> FileContent:
        """The content, checked. Unless `partial`, it has every parameter.

        UnknownParameter, WrongShape, WrongDtype, NonfiniteParameter, InvalidState, NumberOutOfRange, InvalidFile.
        """
        content = FileContent()
        for name, tensor in tensors.items():
            self._sort(content, name, tensor, weights_only)
        self._check_complete(content, partial)
        return content

    def _sort(self, content: FileContent, name: str, tensor: Tensor, weights_only: bool) -> None:
        slot = self._slots.get(name)
        if slot is not None:
            _require(name, tensor, slot.shape, slot.dtype)
            require_finite(name, tensor)
            first = content.values.setdefault(slot.index, tensor)
            if first is not tensor and not _same_bytes(first, tensor):
                raise InvalidFile(
                    problem=f"{name[:SHOWN]!r} is a tied weight, and its values differ from those under its other name"
                )
            return
        if self._extras is not None and name in self._extras:
            known = self._extras[name]
            _require(name, tensor, tuple(known.shape), known.dtype)
            content.extras[name] = tensor
            return
        state, parameter = state_of(name) or ("", "")
        owner = self._slots.get(parameter)
        if owner is not None:
            if not weights_only:
                self._sort_state(content, name, state, owner, tensor)
        elif self._extras is None:
            content.extras[name] = tensor
        else:
            raise UnknownParameter(model=self._model, parameter=name[:SHOWN])

    def _sort_state(self, content: FileContent, name: str, state: str, slot: Slot, tensor: Tensor) -> None:
        rule = rule_of(self._layout, slot.group)
        if state == STEP:
            _require(name, tensor, (), torch.int64)
            steps = int(tensor)
            if not 0 <= steps <= LARGEST_WHOLE:
                raise NumberOutOfRange(what=name[:SHOWN], got=steps, least=0, most=LARGEST_WHOLE)
            content.steps[slot.index] = steps
        elif state in rule.state_names:
            _require(name, tensor, slot.shape, dtypes.state_dtype(slot.dtype))
            require_accumulated(tensor, state, slot.name)
            content.states.setdefault(slot.index, {})[state] = tensor
        else:
            raise InvalidFile(
                problem=f"{name[:SHOWN]!r}: rule {rule.name!r} has no state {state[:SHOWN]!r}; it has "
                f"{', '.join((*rule.state_names, STEP))}"
            )

    def _check_complete(self, content: FileContent, partial: bool) -> None:
        missing = [slot.name for slot in self._layout.slots if slot.index not in content.values]
        if missing and not partial:
            _lacks(missing, "; partial=true replaces some parameters only")
        if not content.states and not content.steps:
            return
        lacking = []
        for slot in self._layout.slots:
            found = {*content.states.get(slot.index, ())} | ({STEP} if slot.index in content.steps else set())
            if slot.index in content.values:
                wanted = (*rule_of(self._layout, slot.group).state_names, STEP)
                lacking += [state_name(state, slot.name) for state in wanted if state not in found]
            elif found:
                raise InvalidFile(problem=f"it has state of {slot.name!r}, and not its values")
        if lacking:
            _lacks(lacking, "; a file with state must have the state of each parameter in it")


def _lacks(names: Sequence[str], hint: str) -> None:
    shown = ", ".join(name[:SHOWN] for name in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    raise InvalidFile(problem=f"it lacks {shown}{more}{hint}")


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """WrongShape or WrongDtype unless a tensor has exactly these: a cast could round."""
    if tuple(tensor.shape) != shape:
        raise WrongShape(what=repr(name[:SHOWN]), got=tuple(tensor.shape), expected=shape)
    if tensor.dtype != dtype:
        raise WrongDtype(
            what=repr(name[:SHOWN]), got=dtypes.name_of(tensor.dtype), expected=dtypes.name_of(dtype)
        )


def require_finite(name: str, tensor: Tensor) -> None:
    """NonfiniteParameter if a parameter's values have NaN or infinity."""
    if tensor.numel() and not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):
        raise NonfiniteParameter(parameter=name[:SHOWN])


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
