"""Copies the values of answers into an optimizer's parameters, from tables made once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pushstep.optim.ops.copies import Array, Runs, copy_all
from pushstep.optim.ops.rows import moved
from pushstep.proto.wire.layout import Slot

from ..gradients.stretch import LEAST_TENSORS
from ..transport.streams import Pulled


class Into:
    """Copies answers into the parameters: many small ones by one kernel, and rows of all tables by another."""

    def __init__(self) -> None:
        # by the segment's place: its slots, and what copies into their parameters
        self._tables: dict[tuple[int, int, int, torch.dtype], _Table] = {}

    def take(self, pulled: Pulled, by_name: Mapping[str, Tensor]) -> None:
        """Write the dense values of an answer into the parameters."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for slots, values in pulled.stretches():
            if len(slots) >= LEAST_TENSORS and self._scatter(slots, values, by_name):
                continue
            # another worker may have added a group that this one lacks: skip it, the next push reports it
            for slot, part in zip(slots, pulled.parts(slots, values), strict=True):
                if slot.name in by_name:
                    targets.append(by_name[slot.name])
                    sources.append(part)
        for slot, row, rows in pulled.pieces():
            if slot.name in by_name:
                targets.append(by_name[slot.name].detach().narrow(0, row, len(rows)))
                sources.append(rows)
        copy_all(targets, sources)

    def take_rows(self, pulled: Pulled, by_name: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write the rows of an answer into the parameters, by one kernel; their ids, by name."""
        came: dict[str, Tensor] = {}
        tables: list[Tensor] = []
        named: list[Tensor] = []
        sources: list[int] = []
        for slot, ids, rows in pulled.rows():
            table = by_name.get(slot.name)
            if table is None:
                continue
            came[slot.name] = ids
            plain = table.is_cpu and table.is_contiguous() and not table.is_neg() and rows.is_cpu
            if not (plain and rows.dtype == table.dtype and table.shape == slot.shape):
                _write_rows(table, ids, rows)
            elif ids.numel() and rows.numel():
                tables.append(table)
                named.append(ids)
                sources.append(rows.data_ptr())
        if tables:
            moved([table.detach() for table in tables], named).scatter(sources)
            torch.autograd.graph.increment_version(tables)
        return came

    def _scatter(self, slots: list[Slot], values: Tensor, by_name: Mapping[str, Tensor]) -> bool:
        """Write a stretch of values into the parameters that it is of; False if they are no plain memory of its dtype."""
        key = slots[0].arena, slots[0].start, slots[-1].stop, values.dtype
        known = self._tables.get(key)
        if known is None or known.slots is not slots:
            if any(slot.name not in by_name for slot in slots) or not values.is_cpu:
                return False
            tensors = [by_name[slot.name] for slot in slots]
            known = self._tables[key] = _Table(
                slots, tensors, Runs([slot.stop - slot.start for slot in slots], values.dtype)
            )
        addresses = known.addresses()
        if addresses is None:
            return False
        known.runs.scatter(addresses, values)
        torch.autograd.graph.increment_version(known.tensors)
        return True


class _Table:
    """The parameters of one stretch, and where they were found to lie."""

    def __init__(self, slots: list[Slot], tensors: list[Tensor], runs: Runs) -> None:
        self.slots = slots
        self.tensors = tensors
        self.runs = runs
        self._addresses: Array | None = None
        # they keep the memory that lies there, so that what has its address is it
        self._aliases: list[Tensor] = []

    def addresses(self) -> Array | None:
        """Where the parameters lie; None if some are no plain memory of this dtype."""
        if self._addresses is None or not self.runs.still(self.tensors, self._addresses):
            self._addresses = self.runs.addresses(self.tensors)
            self._aliases = [] if self._addresses is None else [tensor.detach() for tensor in self.tensors]
        return self._addresses


@torch.no_grad()
def _write_rows(parameter: Tensor, ids: Tensor, rows: Tensor) -> None:
    parameter.index_copy_(0, ids.to(parameter.device), rows.to(parameter.device, parameter.dtype))
