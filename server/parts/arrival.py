"""What has come of one push whose parts go to several ranks, before rank 0 lets it in."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import xxhash

from pushstep.proto.shards_pb2 import RankStaged


@dataclass(slots=True, eq=False)
class Arrival:
    """What the other ranks have of one push."""

    since_s: float
    staged: dict[int, RankStaged] = field(default_factory=dict)
    # the push itself is here, and waits
    waiting: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


def together(digest: int, promised: dict[int, int]) -> int:
    """One digest of all parts."""
    if not promised:
        return digest
    text = b"".join(value.to_bytes(8, "little") for pair in sorted(promised.items()) for value in pair)
    return xxhash.xxh3_64_intdigest(digest.to_bytes(8, "little") + text) or 1
