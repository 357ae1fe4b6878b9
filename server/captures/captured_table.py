"""A table of rows as it was at a mark, while later steps change it: the rows that they overwrite are put aside first.

What is put aside costs a step only its own rows. The reader lays it over what it reads from the table itself. It merges
what the steps have put aside into few runs, each sorted by row, so that a part of the table is found quickly in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pushstep.proto.wire.layout import Slot

from ..devices.device import DeviceStream
from ..process.memory import take

# Bytes of a table that are read at once, while steps of the model wait.
CHUNK_BYTES: Final = 1 << 20
# Rows of which the versions are looked at at once.
SCANNED_ROWS: Final = 1 << 20
WHAT: Final = "what a snapshot keeps of the model"


@dataclass(frozen=True, slots=True)
class _Aside:
    """Rows that were overwritten, as they were at the mark: ids ascending, rows of each tensor by name."""

    ids: Tensor
    rows: Mapping[str, Tensor]

    def merged(self, other: _Aside) -> _Aside:
        ids, order = torch.cat([self.ids, other.ids]).sort()
        names = self.rows.keys() & other.rows.keys()
        return _Aside(ids, {name: torch.cat([self.rows[name], other.rows[name]])[order] for name in names})


class CapturedTable:
    """One row-sparse parameter and its states at the mark. The capture's lock guards every method but `over`."""

    def __init__(
        self, slot: Slot, tensors: Mapping[str, Tensor], changed: Tensor, version: int, stream: DeviceStream
    ) -> None:
        """tensors: each as (rows, elements of a row). changed: the version of each row's last change."""
        self.slot = slot
        self._tensors = tensors
        self._changed = changed
        self._version = version
        self._stream = stream
        # all rows as they were before the table was overwritten as a whole, under what is put aside
        self._whole: Mapping[str, Tensor] | None = None
        self._fresh: list[_Aside] = []
        self._runs: list[_Aside] = []
        self._read: set[str] = set()

    def _unread(self) -> list[str]:
        return [name for name in self._tensors if name not in self._read]

    # For the writer thread.

    def save_rows(self, ids: Tensor) -> int:
        """Put those of these rows aside that a step overwrites for the first time since the mark; how many bytes."""
        names = self._unread()
        if self._whole is not None or not names:
            return 0
        new = ids[self._changed[ids] <= self._version]
        if not new.numel():
            return 0
        rows = {name: self._stream.gathered(self._tensors[name], new) for name in names}
        self._fresh.append(_Aside(new.cpu(), rows))
        return new.nbytes + sum(tensor.nbytes for tensor in rows.values())

    def save_whole(self) -> int:
        """Keep all rows: they are about to be overwritten. Their versions are, too. How many bytes that takes."""
        if self._whole is not None:
            return 0
        self._changed = self._changed.clone()
        whole = {}
        for name in self._unread():
            tensor = self._tensors[name]
            whole[name] = take(tensor.shape, tensor.dtype, WHAT)
            self._stream.fetch(whole[name], tensor)
        self._whole = whole
        return sum(tensor.nbytes for tensor in whole.values())

    # For the reader.

    def touched(self, since: int, first: int) -> Tensor:
        """The ids of rows from `first` on, SCANNED_ROWS of them, that have changed behind a version."""
        with self._stream.here():
            part = self._changed[first : first + SCANNED_ROWS]
            return (torch.nonzero(part > since).flatten() + first).cpu()

    def base(self, name: str) -> Tensor:
        """What what is put aside is laid over."""
        return self._tensors[name] if self._whole is None else self._whole[name]

    def take_fresh(self) -> list[_Aside]:
        """What was put aside since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def end(self, name: str) -> None:
        """Keep nothing more of a tensor: all that is needed of it was read."""
        self._read.add(name)

    def over(self, part: Tensor, name: str, want: range | Tensor, fresh: list[_Aside]) -> None:
        """Lay what was put aside over rows that were read: those of a range, or those with these ids, ascending."""
        for aside in fresh:
            while self._runs and self._runs[-1].ids.numel() <= 2 * aside.ids.numel():
                aside = self._runs.pop().merged(aside)
            self._runs.append(aside)
        if not len(want):
            return
        ends = torch.tensor([int(want[0]), int(want[-1]) + 1], dtype=torch.int64, device="cpu")
        for run in self._runs:
            low, high = torch.searchsorted(run.ids, ends).tolist()
            if low == high:
                continue
            found = run.ids[low:high]
            if isinstance(want, range):
                part[found - want.start] = run.rows[name][low:high]
            else:
                at = torch.searchsorted(want, found)
                there = want[at] == found
                part[at[there]] = run.rows[name][low:high][there]


def chunks_of(table: CapturedTable, ids: Tensor | None, itemsize: int) -> Iterator[range | Tensor]:
    """All rows as ranges, or the rows with these ids, in parts of some CHUNK_BYTES."""
    rows = table.slot.rows if ids is None else ids.numel()
    step = max(1, CHUNK_BYTES // max(1, table.slot.row_elements * itemsize))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield range(first, last) if ids is None else ids[first:last]
