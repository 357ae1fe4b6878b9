"""An answer that came in parts, of one version: it reads as the answer of a server that holds the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushstep.proto.wire.layout import Layout, Slot

from ..transport.streams import Pulled
from .parts import Held, Part

_Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Joined(Pulled):
    """The parts' answers. Values that lie in one rank are views of its answer; only cut parameters are put together.

    `header` and `body` are rank 0's; `layout` is the whole model's.
    """

    answers: Sequence[tuple[Part, Pulled]]

    def dense(self) -> list[tuple[Slot, str, Tensor]]:
        """See `Pulled.dense`."""
        by_rows = self._by_rows()
        found: dict[tuple[str, int], list[tuple[Held, Tensor]]] = {}
        for held, state, values in self._values():
            if held.whole.index not in by_rows:
                found.setdefault((state, held.whole.index), []).append((held, values))
        return [
            (pieces[0][0].whole, state, _together(pieces)) for (state, _), pieces in sorted(found.items())
        ]

    def stretches(self) -> Iterator[tuple[list[Slot], Tensor]]:
        """See `Pulled.stretches`. Of parameters that lie in one rank."""
        by_rows = self._by_rows()
        for part, pulled in self.answers:
            for slots, _, values in pulled._dense():
                for first, whole in part.whole_runs(slots):
                    if not any(slot.index in by_rows for slot in whole):
                        start = slots[first].start - slots[0].start
                        yield whole, values[start : start + whole[-1].stop - whole[0].start]

    def pieces(self) -> Iterator[tuple[Slot, int, Tensor]]:
        """See `Pulled.pieces`."""
        by_rows = self._by_rows()
        for held, _, values in self._values():
            if not held.is_whole and held.whole.index not in by_rows:
                yield held.whole, held.first_row, values

    def _values(self) -> Iterator[tuple[Held, str, Tensor]]:
        for part, pulled in self.answers:
            for slot, state, values in Pulled.dense(pulled):
                yield part.held[slot.index], state, values

    def rows(self) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """See `Pulled.rows`. A cut table whose pieces came partly whole comes by rows."""
        for pieces in self._by_rows().values():
            whole = pieces[0][0].whole
            ids = torch.cat([ids for _, (ids, _) in pieces]) if len(pieces) > 1 else pieces[0][1][0]
            rows = torch.cat([rows for _, (_, rows) in pieces]) if len(pieces) > 1 else pieces[0][1][1]
            yield whole, ids, rows

    def _by_rows(self) -> dict[int, list[tuple[Held, _Rows]]]:
        """By parameter, what came by rows, with ids of the whole parameter; nothing came in most answers."""
        found: dict[int, list[tuple[Held, _Rows]]] = {}
        for part, pulled in self.answers:
            for slot, ids, rows in pulled.rows():
                held = part.held[slot.index]
                placed = ids if held.is_whole else ids + held.first_row
                found.setdefault(held.whole.index, []).append((held, (placed, rows)))
        if found:
            for held, _, values in self._values():
                if held.whole.index in found:
                    ids = torch.arange(
                        held.first_row, held.first_row + held.slot.rows, dtype=torch.int64, device="cpu"
                    )
                    found[held.whole.index].append((held, (ids, values)))
        return found


def _together(pieces: Sequence[tuple[Held, Tensor]]) -> Tensor:
    """The values of one parameter, from all its pieces."""
    if len(pieces) == 1:
        return pieces[0][1]
    return torch.cat([values for _, values in sorted(pieces, key=lambda piece: piece[0].first_row)])


def steps_of(whole: Layout, parts: Sequence[tuple[Part, Pulled]]) -> list[int]:
    """The steps of each parameter, in the whole manifest's order, from the headers of PullState."""
    steps = [0] * len(whole.slots)
    for part, pulled in parts:
        for held, count in zip(part.held, pulled.header.steps, strict=True):
            steps[held.whole.index] = int(count)
    return steps
