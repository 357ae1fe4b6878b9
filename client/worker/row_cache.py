"""Rows of embedding tables kept at the worker, with a bound on how old they may be; and the next batch's, asked for early.

A row may be used while the session knows of at most `max_staleness` versions that were made since the row was read. It learns
of versions by its own receipts and by what it pulls. 0 never returns a row that is older than this worker's last push; with 1
the rows of the next batch can be asked for before the push of this one, and come beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import grpc
import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.rows import different
from pushstep.proto.errors import InvalidSettings, PushstepError
from pushstep.proto.wire.layout import Layout, Slot

from ..gradients.body import as_array, row_ids
from ..transport.retry import TransportFailure
from .cache import Array
from .rows_asked import RowsAsked

Wanted = Mapping[Slot, Tensor]
# Begins to pull rows; what waits for them, and gives the (timeline, version) that they are of.
Finish = Callable[[], tuple[tuple[int, int], dict[Slot, Tensor]]]
NEVER: Final = -1


class Source(NamedTuple):
    """Where rows come from: calls of the session."""

    layout: Callable[[], Layout]
    # the newest (timeline, version) that the session has heard of
    known: Callable[[], tuple[int, int]]
    begin: Callable[[RowsAsked, Layout], Finish]
    pull: Callable[[RowsAsked, Layout], tuple[tuple[int, int], dict[Slot, Tensor]]]
    model: str


class RowCache:
    """Made by `Session.row_cache`. Not for use by several threads at once."""

    def __init__(self, source: Source, max_staleness: int, most_rows: int) -> None:
        """`most_rows`: of each table; beyond it the table's rows are forgotten, and those that are used come again."""
        if max_staleness < 0 or most_rows < 1:
            raise InvalidSettings(
                problem=f"max_staleness={max_staleness}, most_rows={most_rows}: not below 0, and not below 1"
            )
        self._source = source
        self._max_staleness = max_staleness
        self._most_rows = most_rows
        self._tables: dict[str, _Table] = {}
        self._at = (0, 0)
        self._ahead: list[tuple[RowsAsked, Finish]] = []
        # rows that were here, and rows that had to be pulled
        self.hits = 0
        self.misses = 0

    def prefetch(self, wanted: Mapping[str, Any]) -> None:
        """Begin to pull the rows of {name: ids} that are not here, or will be too old after one push.

        Returns at once; the next `get` takes them in.
        """
        missing = self._missing(self._slots(wanted), self._oldest() + 1)
        if missing:
            asked = RowsAsked(missing)
            self._ahead.append((asked, self._source.begin(asked, self._source.layout())))

    def get(self, wanted: Mapping[str, Any]) -> dict[str, Array]:
        """Rows of {name: ids}, each in the order of its ids. What is not here, or too old, is pulled at one version."""
        self._land()
        slots = self._slots(wanted)
        oldest = self._oldest()
        missing = self._missing(slots, oldest)
        pulled = sum(ids.numel() for ids in missing.values())
        while missing:
            for slot, ids in missing.items():
                if self._tables[slot.name].is_full_with(ids.numel(), self._most_rows):
                    self._tables[slot.name].forget()
                    missing[slot] = different(slots[slot])
            asked = RowsAsked(missing)
            timeline = self._at[0]
            self._take(*self._source.pull(asked, self._source.layout()), missing)
            # a restore makes an older version the newest one, and leaves nothing of what was here
            oldest = oldest if self._at[0] == timeline else self._oldest()
            missing = self._missing(slots, oldest)
        self.misses += pulled
        self.hits += sum(ids.numel() for ids in slots.values()) - pulled
        return {slot.name: as_array(self._tables[slot.name].rows(ids)) for slot, ids in slots.items()}

    def forget(self) -> None:
        """Have everything pulled anew, also what was asked for early."""
        self._land()
        self._tables.clear()

    def _slots(self, wanted: Mapping[str, Any]) -> dict[Slot, Tensor]:
        layout = self._source.layout()
        slots = {layout.slot(name, self._source.model): ids for name, ids in wanted.items()}
        found = {slot: row_ids(ids, slot) for slot, ids in slots.items()}
        for slot in found:
            if slot.name not in self._tables or self._tables[slot.name].slot != slot:
                self._tables[slot.name] = _Table(slot)
        return found

    def _oldest(self) -> int:
        """The oldest version that may be used. All is forgotten when the model was restored."""
        self._heard(self._source.known())
        return self._at[1] - self._max_staleness

    def _heard(self, at: tuple[int, int]) -> None:
        if at[0] > self._at[0]:
            for table in self._tables.values():
                table.forget()
        self._at = max(self._at, at)

    def _missing(self, slots: Mapping[Slot, Tensor], oldest: int) -> dict[Slot, Tensor]:
        missing = {slot: self._tables[slot.name].missing(ids, oldest) for slot, ids in slots.items()}
        return {slot: ids for slot, ids in missing.items() if ids.numel()}

    def _land(self) -> None:
        """Take in what was asked for early. If that broke off, `get` pulls it."""
        ahead, self._ahead = self._ahead, []
        for asked, finish in ahead:
            try:
                at, rows = finish()
            except (grpc.RpcError, TransportFailure, PushstepError):
                continue
            self._take(at, rows, asked.wanted)

    def _take(self, at: tuple[int, int], rows: Mapping[Slot, Tensor], wanted: Wanted) -> None:
        self._heard(at)
        if at[0] == self._at[0]:
            for slot, values in rows.items():
                self._tables[slot.name].put(wanted[slot], values, at[1])


class _Table:
    """The rows of one table that are here, and the version of each."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._place = np.full(slot.rows, NEVER, np.int32)
        self.forget()

    def forget(self) -> None:
        """Keep no row."""
        self._place.fill(NEVER)
        self._versions = np.zeros(0, np.int64)
        self._values: Tensor | None = None
        self._count = 0

    def is_full_with(self, more: int, most_rows: int) -> bool:
        """True if so many rows more would be too many."""
        return self._count > 0 and self._count + more > most_rows

    def missing(self, ids: Tensor, oldest: int) -> Tensor:
        """The different ones of ids whose rows are not here, or are older than `oldest`."""
        named = ids.numpy()
        places = self._place[named]
        stale = places < 0
        if self._count:
            stale |= self._versions[places] < oldest
        return different(torch.from_numpy(named[stale]))

    def put(self, ids: Tensor, rows: Tensor, version: int) -> None:
        """Keep rows, each different id once, in place of older ones."""
        named = ids.numpy()
        fresh = named[self._place[named] < 0]
        self._place[fresh] = np.arange(self._count, self._count + len(fresh), dtype=np.int32)
        self._count += len(fresh)
        if self._values is None or len(self._versions) < self._count:
            self._grow(rows)
        places = self._place[named]
        newer = self._versions[places] <= version
        at = torch.from_numpy(places[newer].astype(np.int64))
        if self._values is not None:
            self._values[at] = rows[torch.from_numpy(newer)]
        self._versions[places[newer]] = version

    def _grow(self, rows: Tensor) -> None:
        room = max(1024, 2 * self._count)
        values = torch.empty((room, *rows.shape[1:]), dtype=rows.dtype, device="cpu")
        if self._values is not None:
            values[: len(self._versions)] = self._values
        self._values = values
        self._versions = np.concatenate([self._versions, np.zeros(room - len(self._versions), np.int64)])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows in the order of ids, all of which are here."""
        if self._values is None:
            return torch.empty((0, *self.slot.shape[1:]), dtype=self.slot.dtype, device="cpu")
        return self._values[torch.from_numpy(self._place[ids.numpy()].astype(np.int64))]
