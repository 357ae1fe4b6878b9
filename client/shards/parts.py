"""The part of a model that each rank has, in the terms of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pushstep.proto.wire.layout import Layout, Slot
from pushstep.proto.wire.shards import Part as Cut


@dataclass(frozen=True, slots=True)
class Held:
    """A piece of a parameter: some of its rows, or all of it. `slot` is its place in its rank's layout."""

    slot: Slot
    whole: Slot
    start: int
    stop: int
    is_whole: bool

    @property
    def first_row(self) -> int:
        """The first row of the piece."""
        return self.slot.first_row

    @property
    def is_last(self) -> bool:
        """Whether the parameter ends here."""
        return self.stop == self.whole.stop - self.whole.start

    def view(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of the whole parameter's shape, over the same memory."""
        return tensor.detach().narrow(0, self.first_row, self.slot.rows)


class Part:
    """One rank's part: `held` by the index in the rank's layout, `of` by the whole parameter's index."""

    def __init__(self, cut: Cut, whole: Layout) -> None:
        self.rank = cut.rank
        self.layout = cut.layout
        self.held = [
            Held(
                cut.layout.slots[piece.index],
                whole.slots[piece.whole],
                piece.start,
                piece.stop,
                piece.is_whole,
            )
            for piece in cut.pieces
        ]
        self.of = {held.whole.index: held for held in self.held}
        # by the first and the last slot of a stretch, its runs of whole parameters
        self._runs: dict[tuple[int, int], list[tuple[int, list[Slot]]]] = {}

    def whole_runs(self, slots: Sequence[Slot]) -> list[tuple[int, list[Slot]]]:
        """Of neighbours in the part, those that are not cut: for each run its first place, and the whole model's slots.

        The same list each time, so that what is made of it can be kept.
        """
        key = slots[0].index, slots[-1].index
        known = self._runs.get(key)
        if known is None:
            known = self._runs[key] = []
            for place, slot in enumerate(slots):
                held = self.held[slot.index]
                if not held.is_whole:
                    continue
                if known and known[-1][0] + len(known[-1][1]) == place:
                    known[-1][1].append(held.whole)
                else:
                    known.append((place, [held.whole]))
        return known
