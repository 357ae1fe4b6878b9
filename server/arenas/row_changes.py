"""Which rows of a table a version has changed, for readers who have an earlier one.

The version of each row's last change is kept. A scan of the versions of all rows costs as much as the table is long (100,000 rows: 40 us, 2 M: 1 ms). So
the ids of the last pushes are kept, too, up to a share of the table: for a reader who is few versions behind.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.rows import different
from pushstep.proto.wire.layout import Slot

# Ids are kept up to one for so many rows. With more of them a scan costs no more.
ROWS_PER_ID: Final = 16
LEAST_IDS: Final = 1024
# Pushes whose ids are kept. To look through more would cost as much as a scan.
MOST_PUSHES: Final = 1024


class RowChanges:
    """The changes of all tables of a model, by their slots' indices. Used in the writer thread."""

    def __init__(self) -> None:
        # the version of each row's last change
        self.versions: dict[int, Tensor] = {}
        self._recent: dict[int, _Recent] = {}

    def of(self, slot: Slot, changed: int, now: int, device: torch.device) -> Tensor:
        """The versions of a table's rows, which a step writes. `changed`: of a change of all rows; `now`: before the step."""
        if slot.index not in self.versions:
            self.versions[slot.index] = torch.full((slot.rows,), changed, dtype=torch.int64, device=device)
            self._recent[slot.index] = _Recent(slot.rows, now)
        return self.versions[slot.index]

    def add(self, slot: Slot, ids: Tensor, version: int) -> None:
        """Note that a version has changed these rows: ascending ids, without repetition."""
        self._recent[slot.index].add(version, ids)

    def all_of(self, index: int, version: int) -> None:
        """Note that a version may have changed every row of a table."""
        self.versions[index].fill_(version)
        self._recent[index].forget(version)

    def after(self, index: int, version: int | None) -> Tensor | None:
        """The ids of a table's rows that have changed behind a version, ascending; None behind no version: all of them."""
        if version is None:
            return None
        recent = self._recent[index].after(version)
        return torch.nonzero(self.versions[index] > version).flatten() if recent is None else recent


class _Recent:
    """The ids of the rows that changed in each of the last versions."""

    def __init__(self, rows: int, version: int) -> None:
        self._most = max(LEAST_IDS, rows // ROWS_PER_ID)
        self._log: deque[tuple[int, Tensor]] = deque()
        self._count = 0
        # what changed up to this version is not known
        self._since = version

    def add(self, version: int, ids: Tensor) -> None:
        if not ids.is_cpu:
            self.forget(version)
            return
        if not ids.numel():  # a step of rows that all lie in another rank
            return
        # ids of all of a push's tables lie in one stretch of memory, which a view would keep
        self._log.append((version, torch.from_numpy(ids.numpy().copy())))
        self._count += ids.numel()
        while self._log and (self._count > self._most or len(self._log) > MOST_PUSHES):
            self._since, gone = self._log.popleft()
            self._count -= gone.numel()

    def forget(self, version: int) -> None:
        self._log.clear()
        self._count, self._since = 0, version

    def after(self, version: int) -> Tensor | None:
        """The rows that have changed behind a version, ascending; None if that is not known any more."""
        if version < self._since:
            return None
        found = [ids for _, ids in takewhile(lambda entry: entry[0] > version, reversed(self._log))]
        if len(found) == 1:
            return found[0]
        return different(torch.cat(found)) if found else torch.empty(0, dtype=torch.int64, device="cpu")
