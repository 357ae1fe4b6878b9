"""This service in the embeddings' benchmark: sessions that hold no table, and sessions with an attached optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from pushstep.client import connect

from .embedding_load import Batches, Load, SparseSteps, parameters

RETRY_FOR_S = 60.0


class PushstepRows:
    """A worker that pushes a batch's rows and pulls those of the next, and holds none of the tables."""

    def __init__(self, address: str, model: str, worker: int, load: Load, shared_memory: bool) -> None:
        warnings.simplefilter("ignore")
        self._session = connect(
            address, model=model, worker=f"w{worker}", shared_memory=shared_memory, retry_for_s=RETRY_FOR_S
        )
        names = list(load.tables)
        tables = {name: torch.zeros(shape) for name, shape in load.tables.items()}
        self._session.create(tables, [{"rule": "adagrad", "params": names}])
        self._batches = Batches(load, worker)

    def push_and_pull(self) -> None:
        """Push a batch's rows, and pull those of the next."""
        self._batches.advance()
        self._session.push(self._batches.gradients)
        self._session.pull_rows(self._batches.next_ids)

    def close(self) -> None:
        """Leave."""
        self._session.close()


def row_workers(
    address: str, model: str, first: int, count: int, load: Load, shared_memory: bool
) -> Sequence[PushstepRows]:
    """Workers of one model."""
    return [PushstepRows(address, model, first + number, load, shared_memory) for number in range(count)]


class PushstepTables(SparseSteps):
    """A worker that holds the tables, whose optimizer is attached."""

    def __init__(self, address: str, model: str, worker: int, load: Load, shared_memory: bool) -> None:
        warnings.simplefilter("ignore")
        self._session = connect(
            address, model=model, worker=f"w{worker}", shared_memory=shared_memory, retry_for_s=RETRY_FOR_S
        )
        tables = parameters(load)
        optimizer = self._session.attach(torch.optim.Adagrad(tables), names=list(load.tables))
        super().__init__(load, tables, optimizer, worker)

    def close(self) -> None:
        """Leave."""
        self._session.close()


def table_workers(
    address: str, model: str, first: int, count: int, load: Load, shared_memory: bool
) -> Sequence[PushstepTables]:
    """Workers of one model."""
    return [PushstepTables(address, model, first + number, load, shared_memory) for number in range(count)]
