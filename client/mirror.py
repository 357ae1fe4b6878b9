"""The numpy interface's own copy of a model's parameters.

A pull sends only what has changed since the version that is held here, so the copy and its (timeline, version) go
together: `at` is what the next pull names, and a copy that is forgotten is pulled whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto.layout import Layout

from .gradients import as_array
from .transport import Pulled

Array = np.ndarray[Any, Any]


class Mirror:
    """The parameters by name as the last pull left them; `at` is None before the first and when forgotten."""

    def __init__(self) -> None:
        self.at: tuple[int, int] | None = None
        self.layout: Layout | None = None
        self._values: dict[str, Tensor] = {}

    def take(self, pulled: Pulled) -> None:
        """Become what was pulled."""
        self.layout = pulled.layout
        self.at = None  # if this is broken off, they are nothing
        for slot, _, values in pulled.dense():
            held = self._values.get(slot.name)
            if held is None or (held.shape, held.dtype) != (values.shape, slot.dtype):
                with torch.inference_mode(False):  # or only inference mode may write to it
                    held = self._values[slot.name] = torch.empty(slot.shape, dtype=slot.dtype, device="cpu")
            copy(held, values)
        for slot, ids, rows in pulled.rows():
            self._values[slot.name][ids] = rows.to(slot.dtype)
        for slot in pulled.layout.slots:
            if slot.start == slot.stop:
                self._values.setdefault(slot.name, torch.zeros(slot.shape, dtype=slot.dtype, device="cpu"))
        self.at = (pulled.header.timeline, pulled.header.version)

    def forget(self) -> None:
        """Have the next pull bring everything."""
        self.at = None

    def arrays(self) -> dict[str, Array] | None:
        """Copies of all parameters, also by their other names; None when the model has some that never came here."""
        slots = self.layout.slots if self.layout is not None else ()
        if any(slot.name not in self._values for slot in slots):
            return None
        arrays = {slot.name: as_array(self._values[slot.name]) for slot in slots}
        return arrays | {alias: arrays[slot.name] for slot in slots for alias in slot.aliases}
