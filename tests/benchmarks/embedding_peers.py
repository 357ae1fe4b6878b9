"""The peers of the embeddings' benchmark: rows in, torch's sparse Adagrad, rows of the next batch out.

Each peer gets a batch as its ids and rows, which is less than torch's sparse tensors take to send, and answers with the rows
of the next batch in the order of its ids. The server of torch.distributed.rpc answers a list of tensors; a Ray actor reads
and returns numpy arrays, of which Ray makes no copy beyond its store's.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc

from .embedding_load import Batches, Load, SparseSteps, parameters


class Tables:
    """The tables, stepped by torch's sparse Adagrad."""

    def __init__(self, load: Load) -> None:
        self._tables = dict(zip(load.tables, parameters(load), strict=True))
        self._optimizer = torch.optim.Adagrad(self._tables.values())
        self._lock = threading.Lock()

    def push(self, ids: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Step by one batch."""
        with self._lock:
            for table, named, values in zip(self._tables.values(), ids, rows, strict=True):
                table.grad = torch.sparse_coo_tensor(named[None], values, table.shape, check_invariants=False)
            self._optimizer.step()

    @torch.no_grad()
    def pull(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """The rows with these ids."""
        return [table.index_select(0, named) for table, named in zip(self._tables.values(), ids, strict=True)]


# torch.distributed.rpc

_tables: dict[str, Tables] = {}


def _create(key: str, load: Load) -> None:
    if key not in _tables:
        _tables[key] = Tables(load)


def _drop(key: str) -> None:
    _tables.pop(key, None)


def _push(key: str, ids: list[Tensor], rows: list[Tensor]) -> None:
    _tables[key].push(ids, rows)


def _pull(key: str, ids: list[Tensor]) -> list[Tensor]:
    return _tables[key].pull(ids)


class RpcRows:
    """Calls the server."""

    def __init__(self, key: str, load: Load, seed: int) -> None:
        self._key = key
        self._batches = Batches(load, seed)
        rpc.rpc_sync("server", _create, args=(key, load))

    def push_and_pull(self) -> None:
        """Push a batch's rows, and pull those of the next."""
        self._batches.advance()
        ids, rows = map(list, zip(*self._batches.gradients.values(), strict=True))
        rpc.rpc_sync("server", _push, args=(self._key, ids, rows))
        rpc.rpc_sync("server", _pull, args=(self._key, list(self._batches.next_ids.values())))

    def close(self) -> None:
        """Have the server forget the tables."""
        rpc.rpc_sync("server", _drop, args=(self._key,))


def rpc_workers(key: str, first: int, count: int, load: Load) -> Sequence[RpcRows]:
    """Workers of one server's tables."""
    return [RpcRows(key, load, first + number) for number in range(count)]


# Ray


class Holder:
    """The actor: arrays in, arrays out."""

    def __init__(self, load: Load) -> None:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._tables = Tables(load)

    def push(self, ids: list[Any], rows: list[Any]) -> None:
        """Step by one batch."""
        self._tables.push([torch.from_numpy(each) for each in ids], [torch.from_numpy(each) for each in rows])

    def pull(self, ids: list[Any]) -> list[Any]:
        """The rows with these ids."""
        return [rows.numpy() for rows in self._tables.pull([torch.from_numpy(each) for each in ids])]


class RayRows:
    """Calls the actor."""

    def __init__(self, load: Load) -> None:
        import ray

        self._ray = ray
        self._actor = ray.remote(Holder).options(num_cpus=2).remote(load)
        self._batches = Batches(load, 0)

    def push_and_pull(self) -> None:
        """Push a batch's rows, and pull those of the next."""
        self._batches.advance()
        ids, rows = zip(*self._batches.gradients.values(), strict=True)
        self._ray.get(
            self._actor.push.remote([each.numpy() for each in ids], [each.numpy() for each in rows])
        )
        wanted = [each.numpy() for each in self._batches.next_ids.values()]
        self._ray.get(self._actor.pull.remote(wanted))

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)


def ray_workers(load: Load) -> Sequence[RayRows]:
    """One worker and its actor."""
    return [RayRows(load)]


# torch alone


class LocalRows(SparseSteps):
    """torch's sparse Adagrad in the worker's process."""

    def __init__(self, load: Load) -> None:
        tables = parameters(load)
        super().__init__(load, tables, torch.optim.Adagrad(tables), 0)

    def close(self) -> None:
        """Nothing to give back."""


def local_workers(load: Load) -> Sequence[LocalRows]:
    """One worker that steps by itself."""
    return [LocalRows(load)]
