"""The headers of an upload that goes to several ranks."""

from __future__ import annotations

from collections.abc import Sequence

from pushstep.proto import training_pb2 as pb

from .parts import Part


def headers(header: pb.UploadHeader, map_version: int, parts: Sequence[Part]) -> list[pb.UploadHeader]:
    """The header for each part, without segments: steps, fresh parameters and manifest are those of the part."""
    return [_header(header, map_version, part) for part in parts]


def _header(header: pb.UploadHeader, map_version: int, part: Part) -> pb.UploadHeader:
    own = pb.UploadHeader()
    own.CopyFrom(header)
    own.map_version = map_version
    del own.segments[:], own.steps[:], own.fresh[:]
    if header.steps:
        own.steps.extend(header.steps[held.whole.index] for held in part.held)
    own.fresh.extend(part.of[index].slot.index for index in header.fresh if index in part.of)
    if header.kind == pb.UPLOAD_KIND_CREATE:
        own.manifest.CopyFrom(part.layout.manifest)
    if header.manifest_hash:
        own.manifest_hash = part.layout.manifest_hash
    if part.rank:
        own.extras_bytes, own.policy = 0, ""
    return own
