"""A whole model of several ranks, brought together in a file of rank 0's that has no name.

The file is mapped, not read into memory: the kernel keeps as much of it there as it has room for. So a model of many ranks
takes room on rank 0's disk, and no more of its memory than a few messages and the copy of its own part. A disk that cannot
read back what was just written to it ends the process, as it does under a journal.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

import torch
import xxhash
from torch import Tensor

from pushstep.proto.errors import MalformedFrame, VersionGone
from pushstep.proto.shards_pb2 import RankContent
from pushstep.proto.wire.shards import Part

from ..arenas.arenas_copy import ArenasCopy
from ..storage import files
from ..storage.snapshots import EXPORT_PREFIX
from .content import STEP_BYTES, Kind, Wanted, digest_of, kinds_of, runs_of, tensors_of
from .shard import ModelShard

NAME: Final = "the model of all ranks"
ALIGNMENT: Final = 64
MOST_AT_ONCE: Final = 1 << 20


class Gathered:
    """The file, until all of it is there. All methods but `taking` block."""

    def __init__(self, shard: ModelShard, wanted: Wanted, folder: Path) -> None:
        """DiskFull, StorageFailed."""
        self._shard = shard
        self._wanted = wanted
        # where each tensor of each arena begins, and each rank's counts of steps
        self._tensors: dict[tuple[int, Kind], int] = {}
        self._steps: dict[int, int] = {}
        self._taken: dict[int, Taking] = {}
        size_bytes = 0
        for part in shard.parts:
            if part is not None:
                self._steps[part.rank] = size_bytes
                size_bytes = _aligned(size_bytes + STEP_BYTES * len(part.pieces))
        for arena in shard.whole.arenas:
            for kind in kinds_of(shard.whole, arena.index, wanted):
                self._tensors[arena.index, kind] = size_bytes
                size_bytes = _aligned(size_bytes + arena.elements * kind.dtype.itemsize)
        try:
            self._file = WholeFile(folder, size_bytes)
        except OSError as error:
            raise files.refusal(NAME, error, folder, size_bytes) from error

    def taking(self, first: RankContent) -> Taking:
        """Take what a rank sends, of which this is the first message. MalformedFrame."""
        rank = int(first.rank)
        part = self._shard.parts[rank] if rank < len(self._shard.parts) else None
        if part is None or rank in self._taken:
            raise MalformedFrame(problem=f"rank {rank} has no part of this model, or sends it twice")
        at = int(first.timeline), int(first.version)
        self._taken[rank] = Taking(self._file, self._places(part), at)
        return self._taken[rank]

    def place(self, copy: ArenasCopy) -> None:
        """Write this rank's own part. DiskFull, StorageFailed."""
        part = self._shard.part
        if part is None:
            return
        places = self._places(part)
        for tensor in tensors_of(copy, part, self._shard.whole, self._wanted):
            offset, _ = next(places)
            self._file.write(tensor.view(torch.uint8).numpy().data, offset)

    def _places(self, part: Part) -> Iterator[tuple[int, int]]:
        """Where the bytes of a part belong: offsets and lengths, in the order in which it is sent."""
        yield self._steps[part.rank], STEP_BYTES * len(part.pieces)
        for run in runs_of(part, self._shard.whole):
            for kind in kinds_of(self._shard.whole, run.whole_arena, self._wanted):
                begin = self._tensors[run.whole_arena, kind]
                itemsize = kind.dtype.itemsize
                yield begin + run.whole_start * itemsize, run.elements * itemsize

    def whole(self, own: ArenasCopy) -> ArenasCopy:
        """The whole model. `own`: rank 0's part. VersionGone if a rank has sent another version."""
        for rank in self._shard.others:
            require_version(rank, self._taken.get(rank), (own.timeline, own.version))
        memory = self._file.mapped()
        whole = self._shard.whole
        steps = [0] * len(whole.slots)
        for part in self._shard.parts:
            if part is not None:
                begin, count = self._steps[part.rank], len(part.pieces)
                counts = memory[begin : begin + STEP_BYTES * count].view(torch.int64).tolist()
                for piece, counted in zip(part.pieces, counts, strict=True):
                    steps[piece.whole] = counted
        parameters: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        averages: dict[str, dict[int, Tensor]] = {
            hook: {} for hook in self._wanted.averages if hook in own.averages
        }
        for arena in whole.arenas:
            states.append({})
            for kind in kinds_of(whole, arena.index, self._wanted):
                begin = self._tensors[arena.index, kind]
                flat = memory[begin : begin + arena.elements * kind.dtype.itemsize].view(kind.dtype)
                if kind.state:
                    states[-1][kind.state] = flat
                elif not kind.average:
                    parameters.append(flat)
                elif kind.average in averages:
                    averages[kind.average][arena.index] = flat
        return replace(
            own, layout=whole, parameters=parameters, states=states, steps=steps, averages=averages
        )

    def close(self) -> None:
        """Take nothing more. A whole that was made of it stays."""
        self._file.close()


class WholeFile:
    """A file without a name, with room for all that it will hold."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """OSError."""
        self._folder = folder
        self._size_bytes = max(1, size_bytes)
        self._lock = threading.Lock()
        self._file = tempfile.TemporaryFile(prefix=EXPORT_PREFIX, dir=folder)  # noqa: SIM115 - close() closes it
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._size_bytes)
        except BaseException:
            self._file.close()
            raise

    def write(self, content: memoryview, offset: int) -> None:
        """Write at an offset. DiskFull, StorageFailed."""
        try:
            while len(content):
                # a rank may still send when the file is closed, and its descriptor another file's
                with self._lock:
                    if self._file.closed:
                        raise MalformedFrame(problem="nobody waits for this part any more")
                    count = os.pwrite(self._file.fileno(), content[:MOST_AT_ONCE], offset)
                content, offset = content[count:], offset + count
        except OSError as error:
            raise files.refusal(NAME, error, self._folder, self._size_bytes) from error

    def mapped(self) -> Tensor:
        """Its bytes, which the kernel reads when they are looked at. StorageFailed."""
        try:
            content = mmap.mmap(self._file.fileno(), self._size_bytes)
        except OSError as error:
            raise files.refusal(NAME, error, self._folder, self._size_bytes) from error
        return torch.frombuffer(content, dtype=torch.uint8)

    def close(self) -> None:
        """Close it. What is mapped stays."""
        with self._lock:
            self._file.close()


class Target(Protocol):
    """Where bytes are written."""

    def write(self, content: memoryview, offset: int) -> None:
        """Write at an offset. It blocks."""


class Taking:
    """What comes from one rank, in order."""

    def __init__(self, target: Target, places: Iterator[tuple[int, int]], at: tuple[int, int]) -> None:
        """`at`: the timeline and the version of what comes."""
        self.at = at
        self.is_complete = False
        self._target = target
        self._places = places
        self._offset, self._left = 0, 0
        self._digest = xxhash.xxh3_64()

    def take(self, message: RankContent) -> None:
        """Write what a message brings. It blocks. MalformedFrame; what the disk refuses."""
        rest = memoryview(message.content)
        self._digest.update(rest)
        while len(rest):
            if not self._left:
                self._offset, self._left = next(self._places, (0, 0))
                if not self._left:
                    raise MalformedFrame(problem="a rank sends more than it has")
            now = rest[: self._left]
            self._target.write(now, self._offset)
            self._offset, self._left = self._offset + len(now), self._left - len(now)
            rest = rest[len(now) :]
        if message.digest:
            self._end(int(message.digest))

    def _end(self, expected: int) -> None:
        if self._left or next(self._places, None) is not None:
            raise MalformedFrame(problem="a rank sends less than it has")
        if digest_of(self._digest) != expected:
            raise MalformedFrame(problem="what a rank has sent is not what has come")
        self.is_complete = True


def require_version(rank: int, taking: Taking | None, at: tuple[int, int]) -> None:
    """MalformedFrame unless a rank has sent all, VersionGone unless it was of this timeline and version."""
    if taking is None or not taking.is_complete:
        raise MalformedFrame(problem=f"rank {rank} has not sent its part")
    if taking.at != at:
        raise VersionGone(version=at[1], model="", rank=rank, retry_after_s=0.0)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
