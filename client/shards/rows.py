"""Rows of a model that lies in several ranks: each rank that has some is asked for its own, and all answer at one version.

Each rank has its call before rank 0 fixes the version, so all calls leave at once, under one random number.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError, VersionGone, WrongShape
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import ID_BYTES, Layout, Slot

from ..transport.spans import Spans
from ..transport.streams import Exchange, Pulled
from .joined import Joined
from .lanes import Lanes, failure_of
from .parts import Part

# Of the ids in one message of at most 4 MiB, beside the names of their parameters.
MOST_BYTES: Final = 3 << 20
Ids = NDArray[np.int64]


class RowsCut:
    """A request for rows of the whole model, whose ids ascend, cut into `requests`: each is for the rank of its one of `parts`.

    The first is for rank 0, with or without rows, the others for those that have some.
    """

    def __init__(
        self, request: pb.PullRowsRequest, whole: Layout, parts: Sequence[Part], map_version: int
    ) -> None:
        """UnknownParameter, WrongShape."""
        self.dtype = request.dtype
        self._named = [
            (whole.slot(selection.parameter, request.model), np.frombuffer(selection.ids, np.int64))
            for selection in request.selections
        ]
        if request.parameter:
            slot = whole.slot(request.parameter, request.model)
            self._named.append((slot, np.fromiter(request.ids, np.int64, len(request.ids))))
        self.slots = [slot for slot, _ in self._named]
        for slot in self.slots:
            if not slot.shape:
                raise WrongShape(what=f"parameter {slot.name!r}", got="()", expected="one with rows")
        read = secrets.randbits(64)
        self.parts: list[Part] = []
        self.requests: list[pb.PullRowsRequest] = []
        for part in parts:
            own = pb.PullRowsRequest(
                model=request.model,
                dtype=request.dtype,
                joined_chunks=request.joined_chunks,
                manifest_hash=part.layout.manifest_hash,
                map_version=map_version,
                read=read,
            )
            if self._fill(own, part) or not part.rank:
                self.parts.append(part)
                self.requests.append(own)
        self.requests[0].ranks.extend(part.rank for part in self.parts[1:])

    def _fill(self, request: pb.PullRowsRequest, part: Part) -> bool:
        """Name the rows that a part has. False if it has none of them."""
        found = [(slot, ids) for slot, ids in self._in(part) if ids.size]
        if ID_BYTES * sum(ids.size for _, ids in found) > MOST_BYTES:
            ((slot, ids),) = found  # only those of one parameter can be so many
            request.parameter = slot.name
            request.ids.extend(ids.tolist())
        else:
            request.selections.extend(
                pb.RowSelection(parameter=slot.name, ids=ids.tobytes()) for slot, ids in found
            )
        return bool(found)

    def _in(self, part: Part) -> Iterator[tuple[Slot, Ids]]:
        """The ids that lie in a part, counted from its first row."""
        for slot, ids in self._named:
            held = part.of.get(slot.index)
            if held is not None:
                first = held.first_row
                low, high = np.searchsorted(ids, [first, first + held.slot.rows])
                yield slot, ids[low:high] - first


@dataclass(frozen=True, slots=True)
class JoinedRows(Joined):
    """The rows of all ranks."""

    asked: Sequence[Slot]
    # of all rows; 0: of each parameter its own
    dtype: int

    def rows(self) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """See `Pulled.rows`. Of each parameter that was asked for, also if it was for no row."""
        came = set()
        for slot, ids, rows in Joined.rows(self):
            came.add(slot.index)
            yield slot, ids, rows
        for slot in self.asked:
            if slot.index not in came:
                dtype = dtypes.to_torch(self.dtype, "rows") if self.dtype else slot.dtype
                none = torch.empty((0, *slot.shape[1:]), dtype=dtype, device="cpu")
                yield slot, torch.empty(0, dtype=torch.int64, device="cpu"), none


class RowCalls:
    """The calls of one read, which have begun."""

    def __init__(
        self,
        cut: RowsCut,
        calls: Sequence[Exchange],
        whole: Layout,
        lanes: Lanes,
        spans: Spans,
        check_map: Callable[[], object],
    ) -> None:
        """`check_map` raises MapChanged if rank 0 has another map by now."""
        self._cut = cut
        self._calls = calls
        self._whole = whole
        self._lanes = lanes
        self._spans = spans
        self._check_map = check_map

    def result(self) -> Pulled:
        """Wait for all, and put them together. VersionGone, MapChanged, or what a rank has refused."""
        outcomes = self._lanes.answers(self._calls, self._spans, are_equal=True)
        failure = failure_of(outcomes)
        if failure is not None:
            if not isinstance(outcomes[0], PushstepError):
                self._check_map()  # by an old one, another rank is where this one is looked for
            raise failure
        first = outcomes[0]
        at = first.header.timeline, first.header.version
        for part, pulled in zip(self._cut.parts, outcomes, strict=True):
            if (pulled.header.timeline, pulled.header.version) != at:
                raise VersionGone(version=at[1], model="", rank=part.rank)
        answers = list(zip(self._cut.parts, outcomes, strict=True))
        return JoinedRows(
            first.header, self._whole, first.body, answers, self._cut.slots, int(self._cut.dtype)
        )
