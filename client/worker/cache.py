"""The parameter cache: the numpy interface's own copy of a model's parameters.

A pull sends only what has changed since the version that the cache holds, so the cache keeps its values together with
their (timeline, version): `at`, which the next pull names. After `forget` the next pull brings everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.proto.wire.layout import Layout, Slot

from ..gradients.body import as_array
from ..transport.streams import Pulled

Array = np.ndarray[Any, Any]


class ParameterCache:
    """Holds the parameters by name as of the last pull. `at` is None before it and after `forget`."""

    def __init__(self) -> None:
        self.at: tuple[int, int] | None = None
        self.layout: Layout | None = None
        self._values: dict[str, Tensor] = {}

    def take(self, pulled: Pulled) -> None:
        """Write an answer's dense values and rows into the cache; an empty parameter becomes empty."""
        self.layout = pulled.layout
        self.at = None  # an interrupted copy leaves values of two versions, which must not count as held
        for slots, values in pulled.stretches():
            for slot, part in zip(slots, pulled.parts(slots, values), strict=True):
                copy(self._place(slot), part)
        for slot, row, rows in pulled.pieces():
            copy(self._place(slot).narrow(0, row, len(rows)), rows)
        for slot, ids, rows in pulled.rows():
            self._values[slot.name][ids] = rows.to(slot.dtype)
        for slot in pulled.layout.slots:
            if slot.start == slot.stop:
                self._values.setdefault(slot.name, torch.zeros(slot.shape, dtype=slot.dtype, device="cpu"))
        self.at = (pulled.header.timeline, pulled.header.version)

    def _place(self, slot: Slot) -> Tensor:
        held = self._values.get(slot.name)
        if held is None or (held.shape, held.dtype) != (slot.shape, slot.dtype):
            with torch.inference_mode(False):  # or else only inference mode may write to it
                held = self._values[slot.name] = torch.empty(slot.shape, dtype=slot.dtype, device="cpu")
        return held

    def forget(self) -> None:
        """Make the next pull bring everything."""
        self.at = None

    def arrays(self) -> dict[str, Array] | None:
        """Copies of all parameters, by name and alias; None if one of them was never pulled."""
        slots = self.layout.slots if self.layout is not None else ()
        if any(slot.name not in self._values for slot in slots):
            return None
        arrays = {slot.name: np.array(as_array(self._values[slot.name])) for slot in slots}
        return arrays | {alias: arrays[slot.name] for slot in slots for alias in slot.aliases}
