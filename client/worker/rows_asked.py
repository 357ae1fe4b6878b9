"""A request for rows of parameters: each different id travels once, and the answer is laid out as the caller has asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pushstep.optim.ops.rows import Merging, has_kernels, moved
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import TooLong
from pushstep.proto.wire.layout import ID_BYTES, Slot

from ..shards.rows import MOST_BYTES
from ..transport.streams import Pulled


class RowsAsked:
    """The ids of some parameters, and where each one's row goes."""

    def __init__(self, wanted: Mapping[Slot, Tensor]) -> None:
        """wanted: int64 ids inside of each parameter."""
        self.wanted = wanted
        self._merging = Merging(
            [(ids, ids) for ids in wanted.values()], [max(1, slot.rows) for slot in wanted]
        )

    def request(self, model: str, dtype: Any) -> pb.PullRowsRequest:
        """The message. TooLong if the ids of several parameters do not fit into one."""
        places = {slot: place for place, slot in enumerate(self.wanted)}
        nbytes = ID_BYTES * sum(self._merging.counts)
        if nbytes > MOST_BYTES and len(places) > 1:
            raise TooLong(
                what="pull_rows", got=nbytes // ID_BYTES, unit="different ids", most=MOST_BYTES // ID_BYTES
            )
        if nbytes > MOST_BYTES:
            ((slot, place),) = places.items()
            return pb.PullRowsRequest(
                model=model, parameter=slot.name, ids=self._merging.ids(place).tolist(), dtype=dtype
            )
        selections = [
            pb.RowSelection(parameter=slot.name, ids=self._merging.ids(place).numpy().tobytes())
            for slot, place in places.items()
        ]
        return pb.PullRowsRequest(model=model, selections=selections, dtype=dtype, joined_chunks=True)

    def answer(self, pulled: Pulled) -> tuple[tuple[int, int], dict[Slot, Tensor]]:
        """The (timeline, version) of an answer, and its rows by parameter, in the order of the ids that were asked for."""
        return (pulled.header.timeline, pulled.header.version), self._rows(pulled)

    def _rows(self, pulled: Pulled) -> dict[Slot, Tensor]:
        came = {slot.index: rows for slot, _, rows in pulled.rows()}
        found: dict[Slot, Tensor] = {}
        tables: list[Tensor] = []
        places: list[Tensor] = []
        targets: list[int] = []
        for table, (slot, ids) in enumerate(self.wanted.items()):
            rows, where = came[slot.index], self._merging.places(table)
            if where is None:
                found[slot] = rows.clone()
            elif has_kernels(rows) and rows.numel():
                found[slot] = torch.empty((ids.numel(), *rows.shape[1:]), dtype=rows.dtype, device="cpu")
                tables.append(rows)
                places.append(where)
                targets.append(found[slot].data_ptr())
            else:
                found[slot] = rows[where]
        if tables:
            moved(tables, places).gather(targets, [0] * len(tables))
        return found
