"""A copy of what a model's arenas held at one version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pushstep.proto.wire.layout import Layout, Slot

from ..captures.capture import PARAMETER, Capture
from .averages import Buffers
from .extras import Extras
from .rules import stays_finite


@dataclass(frozen=True, slots=True)
class ArenasCopy:
    """What Arenas held at one version. Nobody writes to it."""

    layout: Layout
    timeline: int
    version: int
    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    steps: list[int]
    # buffers and frozen values, by name: kept, not stepped
    extras: Extras = field(default_factory=Extras)
    # the (timeline, version) that each restore before it continued from
    lineage: Sequence[tuple[int, int]] = ()
    # what hooks keep beside the parameters: by hook and arena
    averages: Buffers = field(default_factory=dict)

    def flats(self, arena: int) -> Mapping[str, Tensor]:
        """An arena's tensors by name."""
        return {PARAMETER: self.parameters[arena], **self.states[arena]}

    def captured(self) -> Capture:
        """The same, as a snapshot takes it."""
        flats = [self.flats(arena.index) for arena in self.layout.arenas]
        return Capture(
            self.layout,
            self.timeline,
            self.version,
            flats,
            self.steps,
            self.extras,
            self.lineage,
            self.averages,
        )

    @property
    def lineage_here(self) -> list[tuple[int, int]]:
        """The lineage of a timeline that continues from here."""
        return [*self.lineage, (self.timeline, self.version)]

    def stays_finite(self, group: int, values: Mapping[str, float | bool]) -> bool:
        """True if trial steps with these hyperparameters keep a sample of a group's finite elements finite."""
        return stays_finite(self.layout, self.parameters, self.states, self.steps, group, values)

    def view(self, slot: Slot, state: str = "") -> Tensor:
        """One parameter (or its state) in its own shape."""
        flat = self.states[slot.arena][state] if state else self.parameters[slot.arena]
        return flat[slot.start : slot.stop].view(slot.shape)
