"""The load of the embeddings' benchmark: tables, and batches of row ids with a Zipf skew, the same for every side.

A batch has `batch` ids of each table, with repetitions, as the samples of a batch name them: a few rows come in nearly
every batch, most rows hardly ever. Batches and their gradients are made before anything is measured.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL_TABLES, SMALL_ROWS, SMALL_WIDTH = 26, 100_000, 32
LARGE_ROWS, LARGE_WIDTH = 2_000_000, 64
# Of the k-th most frequent row: its share is that of k to the power of minus this.
SKEW = 1.05
BATCHES_KEPT = 6
ID_BYTES, FLOAT32_BYTES = 8, 4


@dataclass(frozen=True)
class Load:
    """How many tables there are, and how many ids of each are in a batch."""

    batch: int
    with_large: bool = True
    rows: int = SMALL_ROWS

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Rows and width by name."""
        tables = {f"table{number:02}": (self.rows, SMALL_WIDTH) for number in range(SMALL_TABLES)}
        return tables | (
            {"large": (self.rows * LARGE_ROWS // SMALL_ROWS, LARGE_WIDTH)} if self.with_large else {}
        )

    @property
    def ids(self) -> int:
        """Ids of a batch, of all tables."""
        return self.batch * len(self.tables)

    @property
    def payload_bytes(self) -> int:
        """Bytes of a batch's ids and of its rows, one for each id."""
        return sum(self.batch * (ID_BYTES + width * FLOAT32_BYTES) for _, width in self.tables.values())


@cache
def _chances(rows: int) -> Any:
    chances = np.cumsum(1.0 / np.arange(1, rows + 1) ** SKEW)
    return chances / chances[-1]


def _drawn(draw: np.random.Generator, rows: int, count: int) -> Tensor:
    """Ids by their frequency, with the frequent ones all over the table."""
    rank = np.searchsorted(_chances(rows), draw.random(count))
    return torch.from_numpy((rank * 7919 + 13) % rows)  # a prime that divides no table's length


class Batches:
    """A worker's batches, in turn. `gradients` are (ids, rows) by table, `next_ids` those of the batch behind it."""

    def __init__(self, load: Load, seed: int) -> None:
        draw = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        rows = {
            name: torch.randn(load.batch, width, generator=generator)
            for name, (_, width) in load.tables.items()
        }
        self._batches = [
            {name: (_drawn(draw, count, load.batch), rows[name]) for name, (count, _) in load.tables.items()}
            for _ in range(BATCHES_KEPT)
        ]
        self._numbers = itertools.cycle(range(BATCHES_KEPT))
        self.gradients = self._batches[-1]
        self.next_ids = {name: ids for name, (ids, _) in self._batches[0].items()}

    def advance(self) -> None:
        """Go to the next batch."""
        number = next(self._numbers)
        self.gradients = self._batches[number]
        behind = self._batches[(number + 1) % BATCHES_KEPT]
        self.next_ids = {name: ids for name, (ids, _) in behind.items()}

    def sparse(self, load: Load) -> list[list[Tensor]]:
        """All batches as torch's sparse gradients, as backward leaves them: not coalesced."""
        return [
            [
                torch.sparse_coo_tensor(ids[None], rows, load.tables[name], check_invariants=False)
                for name, (ids, rows) in batch.items()
            ]
            for batch in self._batches
        ]


def parameters(load: Load) -> list[torch.nn.Parameter]:
    """The tables."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in load.tables.values()]


class SparseSteps:
    """An optimizer over the tables, local or remote, that gets the batches' gradients in turn."""

    def __init__(self, load: Load, tables: list[torch.nn.Parameter], optimizer: Any, seed: int) -> None:
        self._tables = tables
        self._optimizer = optimizer
        self._gradients = itertools.cycle(Batches(load, seed).sparse(load))

    def exchange(self) -> None:
        """Take a step."""
        for table, gradient in zip(self._tables, next(self._gradients), strict=True):
            table.grad = gradient
        self._optimizer.step()
