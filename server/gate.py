"""Whether a push may touch the model: its declared shape at the header, its content once it is complete.

`check_header` runs before a byte of the body is read. `inspect` is the one pass over a complete body (in a worker
thread): row ids, finiteness and norms. `decide` turns what it found into a verdict; it is the only place where
finiteness is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.norms import square_sums
from pushstep.proto import dtypes, limits
from pushstep.proto.errors import (
    MalformedFrame,
    ManifestChanged,
    NonfiniteGradient,
    SparseNotSupported,
)
from pushstep.proto.frames import Assembly
from pushstep.proto.hyperparameters import Values
from pushstep.proto.layout import Layout, check_body
from pushstep.proto.region import SharedBody
from pushstep.proto.training_pb2 import GroupEdit, PushCommit, PushHeader
from pushstep.proto.types_pb2 import GroupValues, ParameterNorm, Staged

from .arrived import Arrived
from .groups import ParamGroups
from .staging import DensePart, RowsPart, StagedPush
from .threads import INLINE_PARTS
from .unpack import Take, dense_part, rows_part

# Beside it a check takes nothing: 256 Ki elements lie in the cache.
BLOCK_ELEMENTS: Final = 1 << 18


class Nonfinite(StrEnum):
    """What becomes of a gradient with NaN or infinity."""

    REJECT = "reject"
    SKIP = "skip"
    APPLY = "apply"


# The views of a segment's bytes. A push of every second of 100,000 parameters took 270 MB beside its bytes.
SEGMENT_BYTES: Final = 6 << 10


@dataclass(frozen=True, slots=True)
class Declared:
    """What a push's header says of its body: each segment's bytes, and what the whole of it comes to."""

    lengths: list[int]
    # with what it is unpacked to
    bytes_needed: int
    parameters: int

    @property
    def segments_bytes(self) -> int:
        """What is kept for each of many segments, beside its bytes."""
        return SEGMENT_BYTES * max(0, len(self.lengths) - INLINE_PARTS)

    @property
    def is_plain(self) -> bool:
        """Whether it is stepped as it lies there, with nothing to unpack."""
        return self.bytes_needed == sum(self.lengths)


def declared(layout: Layout, header: PushHeader, model: str, limit_bytes: int) -> Declared:
    """What a header declares; a named error if the push cannot be one of this model's."""
    lengths = check_header(layout, header, model, limit_bytes)
    return Declared(
        lengths,
        sum(lengths) + sum(map(layout.unpacked_bytes, header.segments)),
        sum(len(layout.slots_of(segment)) for segment in header.segments),
    )


def require_plausible(
    layout: Layout, segments: Sized, edits: Sequence[GroupEdit | GroupValues], states: int = 0
) -> None:
    """MalformedFrame for a header that names more than a model has, which is not kept while anything is waited for.

    `states`: of a parameter, that may be sent beside it.
    """
    groups = len(layout.manifest.groups)
    if len(segments) > (1 + states) * len(layout.slots):
        raise MalformedFrame(problem=f"{len(segments)} segments, of {len(layout.slots)} parameters")
    if len(edits) > 2 * groups:
        raise MalformedFrame(
            problem=f"{len(edits)} edits of {groups} groups: each may have one in the header and one in the commit"
        )


def check_header(layout: Layout, header: PushHeader, model: str, limit_bytes: int) -> list[int]:
    """The byte length of each declared segment; a named error if the push cannot be one of this model's."""
    if header.manifest_hash != layout.manifest_hash:
        raise ManifestChanged(model=model)
    if header.skip == bool(header.segments):
        raise MalformedFrame(problem="a push must hold at least one gradient, a skip push none")
    if any(segment.state for segment in header.segments):
        raise MalformedFrame(problem="a push carries gradients, not optimizer state")
    return check_body(layout, header.segments, limit_bytes, of_push=True)


def close_header(layout: Layout, header: PushHeader, commit: PushCommit) -> None:
    """Enter into the header what its sender knew only at the end of the stream. TooLong if it is too much together."""
    header.edits.extend(commit.edits)  # of two edits of one group the later counts
    header.metrics.update(commit.metrics)
    if commit.HasField("worker_state"):
        header.worker_state = commit.worker_state
    header.samples = commit.samples or header.samples
    if commit.edits or commit.metrics:
        require_plausible(layout, header.segments, header.edits)
        limits.check(header)


def inspect(
    layout: Layout,
    header: PushHeader,
    body: Assembly | SharedBody,
    take: Take,
    arrived: Arrived | None = None,
) -> StagedPush:
    """Read a complete body once, or what `arrived` has not. RowOutOfRange or MalformedFrame if it names what does not exist.

    take: gives the memory for what is unpacked.
    """
    staged = Staged(
        identity=header.identity,
        base_version=header.base_version,
        finite=True,
        segments=header.segments,
    )
    parts: list[DensePart | RowsPart] = []
    sums: Sequence[float] | None
    known: list[Sequence[float] | None] = []
    for index, segment in enumerate(header.segments):
        slots = layout.slots_of(segment)
        found = arrived.dense(index) if arrived is not None else None
        if found is not None:
            gradient, sums = found
            parts.append(DensePart(segment.arena, segment.start, tuple(slots), gradient))
        else:
            unpack = rows_part if segment.HasField("rows") else dense_part
            part, sums = unpack(segment, slots, body, index, take)
            parts.append(part)
        known.append(sums)
    return measured(staged, parts, known)


def measured(
    staged: Staged,
    parts: Sequence[DensePart | RowsPart],
    known: Sequence[Sequence[float] | None] | None = None,
) -> StagedPush:
    """Gradients with their norms (`known`: of some parts), and whether they are finite in the dtype that is stepped."""
    nonfinite = None
    for part, sums in zip(parts, known or [None] * len(parts), strict=True):
        if isinstance(part, RowsPart):
            slots, pieces = [part.slot], [part.rows]
        else:
            slots = list(part.slots)
            pieces = [part.gradient]  # a lone parameter's is all of it: a view less
            if len(slots) > 1:
                pieces = [part.gradient[slot.start - part.start : slot.stop - part.start] for slot in slots]
        norms = square_sums(pieces) if sums is None else sums
        for slot, piece, norm in zip(slots, pieces, norms, strict=True):
            staged.norms.append(ParameterNorm(parameter=slot.index, square_sum=norm))
            stepped = dtypes.state_dtype(slot.dtype)
            narrowed = piece.dtype.itemsize > stepped.itemsize  # a finite float64 may be an infinite float32
            if (narrowed or not math.isfinite(norm)) and not _all_finite(piece, stepped):
                nonfinite = nonfinite or slot.name
    staged.finite = nonfinite is None
    sums_of = {norm.parameter: norm.square_sum for norm in staged.norms}
    norm = math.sqrt(sum(sums_of[index] for index in sorted(sums_of)))
    return StagedPush(staged, parts, nonfinite, norm)


def _all_finite(values: Tensor, stepped: torch.dtype) -> bool:
    """For float64, whose squares can overflow where the values do not. A block at a time: nobody counts what it takes."""
    flat = values.reshape(-1)
    blocks = (flat[start : start + BLOCK_ELEMENTS] for start in range(0, flat.numel(), BLOCK_ELEMENTS))
    return all(bool(torch.isfinite(block.to(stepped)).all()) for block in blocks)


def require_steppable(push: StagedPush, groups: ParamGroups, planned: Mapping[int, Values]) -> None:
    """SparseNotSupported if a group, with the values planned for it, refuses the rows of a push."""
    for part in push.parts:
        if isinstance(part, RowsPart):
            group = groups.list[part.slot.group]
            try:
                group.rule.check_rows(planned.get(part.slot.group, group.values))
            except RuntimeError as error:
                raise SparseNotSupported(parameter=part.slot.name, problem=str(error)) from error


def decide(push: StagedPush, nonfinite: Nonfinite) -> bool:
    """True to go on, False to skip; NonfiniteGradient to reject."""
    if push.nonfinite_parameter is None or nonfinite is Nonfinite.APPLY:
        return True
    if nonfinite is Nonfinite.SKIP:
        return False
    raise NonfiniteGradient(parameter=push.nonfinite_parameter)
