"""Checks what a push's header declares, before any of its body is read."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from pushstep.optim.ops.streaming import Blocks
from pushstep.proto.errors import MalformedFrame, ManifestChanged
from pushstep.proto.training_pb2 import GroupEdit, PushCommit, PushHeader
from pushstep.proto.types_pb2 import GroupValues, Segment
from pushstep.proto.wire import limits
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.frames import segment_table
from pushstep.proto.wire.layout import Layout, Slot

from ..process.inline import INLINE_PARTS

# Bytes of the views of one segment. They take 270 MB in a push of every second one of 100,000 parameters.
SEGMENT_BYTES: Final = 6 << 10
# Bytes of one segment in a journal's record, beside its gradients.
RECORDED_SEGMENT_BYTES: Final = 64
# Pushes of more segments are looked at anew each time.
SEGMENTS_REMEMBERED: Final = 64


@dataclass(frozen=True, slots=True)
class Declared:
    """What a push's header declares of its body: the segments, and what follows from them and the layout."""

    segments: Sequence[Segment]
    # of the segments, as a digest begins with it
    table: bytes
    # of each segment: its parameters, and its bytes
    slots: Sequence[Sequence[Slot]]
    lengths: list[int]
    # of the body and of its unpacked form
    bytes_needed: int
    parameters: int
    # kept for the segments beside their content; the first INLINE_PARTS segments do not count
    segments_bytes: int
    # the step reads the body as it was received, with nothing to unpack
    is_plain: bool
    # of each segment, once they are asked for
    _blocks: list[Blocks | None] = field(default_factory=list)

    def blocks(self) -> Sequence[Blocks | None]:
        """Of each dense segment: where its parameters' elements and blocks begin. In any thread."""
        if len(self._blocks) < len(self.slots):
            self._blocks[:] = [
                None
                if segment.HasField("rows") or segment.HasField("elements")
                else Blocks([slot.stop - slot.start for slot in slots])
                for segment, slots in zip(self.segments, self.slots, strict=True)
            ]
        return self._blocks

    @property
    def record_bytes(self) -> int:
        """About the bytes of the push's record in a journal."""
        return self.bytes_needed + RECORDED_SEGMENT_BYTES * len(self.lengths)


# By layout, what the last push declared, if it has few segments: most pushes have the same ones.
_last: WeakKeyDictionary[Layout, Declared] = WeakKeyDictionary()


def last_declared(layout: Layout, header: PushHeader, limit_bytes: int) -> Declared | None:
    """What a header declares, if the last push for this layout has declared the same; else None."""
    last = _last.get(layout)
    if last is None or header.manifest_hash != layout.manifest_hash or header.skip:
        return None
    return last if last.bytes_needed <= limit_bytes and last.segments == header.segments else None


def declared(layout: Layout, header: PushHeader, model: str, limit_bytes: int) -> Declared:
    """What a header declares. A named error if the push is not one for this model."""
    lengths = check_header(layout, header, model, limit_bytes)
    segments, few = header.segments, 0 < len(header.segments) <= SEGMENTS_REMEMBERED
    if few:
        segments = PushHeader(segments=segments).segments  # a copy: the header may be large
    slots = [layout.slots_of(segment) for segment in segments]
    bytes_needed = sum(lengths) + sum(map(layout.unpacked_bytes, segments))
    found = Declared(
        segments,
        segment_table(segments),
        slots,
        lengths,
        bytes_needed,
        parameters=sum(map(len, slots)),
        segments_bytes=SEGMENT_BYTES * max(0, len(segments) - INLINE_PARTS),
        is_plain=bytes_needed == sum(lengths),
    )
    if few:
        _last[layout] = found
    return found


def require_plausible(
    layout: Layout, segments: Sized, edits: Sequence[GroupEdit | GroupValues], states: int = 0
) -> None:
    """Raise MalformedFrame for a header with more segments or edits than the model can have.

    This comes before any wait: such a header would take memory for as long as the wait lasts.
    `states`: how many states of a parameter may be sent beside its value.
    """
    groups = len(layout.manifest.groups)
    if len(segments) > (1 + states) * len(layout.slots):
        raise MalformedFrame(problem=f"{len(segments)} segments, of {len(layout.slots)} parameters")
    if len(edits) > 2 * groups:
        raise MalformedFrame(
            problem=f"{len(edits)} edits of {groups} groups: each may have one in the header and one in the commit"
        )


def check_header(layout: Layout, header: PushHeader, model: str, limit_bytes: int) -> list[int]:
    """The byte length of each declared segment. A named error if the push is not one for this model."""
    if header.manifest_hash != layout.manifest_hash:
        raise ManifestChanged(model=model)
    # of a push to several ranks each may lack a part, which rank 0 sees once all have come
    if header.skip == bool(header.segments) and not (header.map_version and not header.skip):
        raise MalformedFrame(problem="a push must hold at least one gradient, a skip push none")
    if any(segment.state for segment in header.segments):
        raise MalformedFrame(problem="a push carries gradients, not optimizer state")
    return check_body(layout, header.segments, limit_bytes, of_push=True)


def close_header(layout: Layout, header: PushHeader, commit: PushCommit) -> None:
    """Add to the header what its sender knew only at the end. TooLong, MalformedFrame."""
    if commit.edits:
        header.edits.extend(commit.edits)  # of two edits of one group the later one counts
    if commit.metrics:
        header.metrics.update(commit.metrics)
    if commit.HasField("worker_state"):
        header.worker_state = commit.worker_state
    header.samples = commit.samples or header.samples
    if commit.edits or commit.metrics:
        require_plausible(layout, header.segments, header.edits)
        limits.check(header)
