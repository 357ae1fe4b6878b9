"""Which segments one body may hold together, and how long each is; checked before a body is read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..errors import MalformedFrame, WrongDtype, WrongLength
from ..types_pb2 import Segment
from . import dtypes
from .layout import Layout


def check_body(
    layout: Layout, segments: Sequence[Segment], limit_bytes: int, *, of_push: bool = False
) -> list[int]:
    """The byte length of each segment. MalformedFrame for overlaps, WrongLength beyond `limit_bytes`.

    This is checked before a body is read. The limit includes what a push is unpacked to. Only a push may have int8
    (else WrongDtype), element-sparse or empty segments (else MalformedFrame).
    """
    spans = []
    lengths = []
    for segment in segments:
        if not of_push:
            _check_plain(segment)
        covered, start, stop = layout.slots_of(segment), segment.start, segment.stop
        # parameters without elements never overlap: the index tells whether two segments are of the same one
        which = covered[0].index if start == stop else -1
        spans.append((segment.state, segment.arena, which, start, stop, covered[0].name))
        lengths.append(layout.segment_bytes(segment, covered))
    _check_apart(spans)
    total = sum(lengths) + (sum(map(layout.unpacked_bytes, segments)) if of_push else 0)
    if total > limit_bytes:
        raise WrongLength(what="the declared body", got=total, expected=f"at most {limit_bytes}")
    return lengths


def _check_apart(spans: list[tuple[str, int, int, int, int, str]]) -> None:
    """MalformedFrame if two segments hold the same parameter.

    Segments end at parameter borders, so it is the first parameter of the later segment.
    """
    spans.sort()
    for before, span in pairwise(spans):
        if before[:3] == span[:3] and (span[2] >= 0 or span[3] < before[4]):
            raise MalformedFrame(problem=f"parameter {span[5]!r} appears in two segments")


def _check_plain(segment: Segment) -> None:
    if segment.HasField("elements") or segment.HasField("parameter"):
        raise MalformedFrame(problem="only a push may carry element-sparse or empty segments")
    if segment.dtype == dtypes.INT8:
        raise WrongDtype(
            what="segment", got="int8, which is for pushes", expected=", ".join(dtypes.NAMES.values())
        )
