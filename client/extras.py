"""What a checkpoint of a module needs beside the parameters that are stepped: buffers and frozen values.

They are small, and only exports and snapshots hold them: the lead worker sends them at the start, at the end and now
and then.
"""

from __future__ import annotations

import contextlib
from typing import Final

from torch import Tensor, nn

from pushstep.proto.errors import PushstepError

from .attendance import Attendance
from .names import clean

EVERY_STEPS: Final = 100


class Extras:
    """Sends what one module has of them. Does nothing without a module."""

    def __init__(self, session: Attendance, module: nn.Module | None) -> None:
        self._session = session
        self._module = module
        self._steps = 0

    def stepped(self) -> None:
        """A step was taken."""
        self._steps += 1
        if self._steps % EVERY_STEPS == 0:
            self.send_if_possible()

    def send_if_possible(self) -> None:
        """Send them, if nothing is in the way: whatever it is, the next step finds it out and says so."""
        with contextlib.suppress(PushstepError):
            self.send()

    def send(self) -> None:
        """Send them as they are, if this worker leads."""
        if self._module is None or not self._session.member().lead:
            return
        slots = self._session.member().layout.slots
        parameters = {name for slot in slots for name in (slot.name, *slot.aliases)}
        extras = {
            clean(name): value
            for name, value in self._module.state_dict().items()
            if isinstance(value, Tensor) and clean(name) not in parameters
        }
        if extras:
            self._session.upload_extras(extras)
