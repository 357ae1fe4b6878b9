"""Parameters on their way out: one version's frames are encoded once per wire dtype and shared by all who ask.

A pull never reads a version that is being written, because encoding runs in the writer's own thread between two
steps; the first frames are on the wire while the last are being encoded. Readers that ask while the writer is busy are answered together. Row-sparse parameters are sent as the rows
that changed since the version a reader has, or whole where that is smaller; those frames are each reader's own.
"""

from __future__ import annotations

import asyncio
import copy
import io
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from pushstep.proto import dtypes
from pushstep.proto.frames import Piece, Source, pack
from pushstep.proto.layout import ID_BYTES, Layout, Slot
from pushstep.proto.memory import MessagePool
from pushstep.proto.types_pb2 import Segment

from .arena import Arenas
from .staging import INLINE_BYTES
from .stepper import Stepper

# Frames of older versions live on while a slow reader is being sent them; beyond this many the next version waits.
LIVE_VERSIONS: Final = 3
CROWDED_RETRY_S: Final = 0.01


class DenseFrames:
    """The frames of one version's densely sent parameters: sent on as they are made, kept until nobody sends them."""

    def __init__(self, segments: list[Segment], memory: MessagePool) -> None:
        self.segments = segments
        self._memory = memory
        self._buffers: list[io.BytesIO] = []
        self._made: list[bytes] = []
        self._complete = False
        self._fault: Exception | None = None
        self._readers: list[asyncio.Future[None]] = []
        weakref.finalize(self, memory.give_back, self._buffers).atexit = False

    def _take(self, size_bytes: int) -> io.BytesIO:
        self._buffers.append(self._memory.take(size_bytes))
        return self._buffers[-1]

    def make(self, bodies: Sequence[Sequence[Source]], wake: Callable[[Callable[[], None]], object]) -> None:
        """Make all of them, in the writer's thread; `wake` has the event loop do something."""
        try:
            for frame in pack(bodies, take=self._take):
                self._made.append(frame)
                wake(self._wake)
        except Exception as error:
            self._fault = error
            raise
        finally:
            self._complete = True
            wake(self._wake)

    def _wake(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            if not reader.done():
                reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = 0
        # in this order: once complete is seen, so is every frame
        while not (self._complete and sent == len(self._made)):
            if sent < len(self._made):
                yield self._made[sent]
                sent += 1
            else:
                reader = asyncio.get_running_loop().create_future()
                self._readers.append(reader)
                await reader
        if self._fault is not None:
            raise copy.copy(self._fault)


@dataclass(frozen=True, slots=True)
class Published:
    """What one reader is sent: all of one version, or nothing because it has it."""

    timeline: int
    version: int
    layout: Layout
    unchanged: bool
    segments: list[Segment]
    dense: DenseFrames | None
    own_frames: list[bytes]
    # the segments lie in the reader's own region: nothing is sent
    shared: bool = False

    async def frames(self) -> AsyncIterator[bytes]:
        """All frames, in the order of the segments."""
        if self.dense is not None:
            async for frame in self.dense:
                yield frame
        for frame in self.own_frames:
            yield frame


@dataclass(slots=True)
class _Request:
    timeline: int | None
    have_version: int | None
    wire: torch.dtype | None
    answer: asyncio.Future[Published]


class Publisher:
    """Hands out versions of one model."""

    def __init__(self, arenas: Arenas, stepper: Stepper) -> None:
        self._arenas = arenas
        self._stepper = stepper
        self._lock = threading.Lock()  # guards _waiting and _scheduled, between the loop and the writer
        self._waiting: list[_Request] = []
        self._scheduled = False
        self._current: dict[torch.dtype | None, tuple[tuple[int, int], DenseFrames]] = {}
        self._live: dict[torch.dtype | None, weakref.WeakSet[DenseFrames]] = {}
        self._memory = MessagePool()

    async def newest(
        self, timeline: int | None, have_version: int | None, wire: torch.dtype | None
    ) -> Published:
        """The newest version that is complete when the writer gets to it, for a reader that has `have_version`."""
        loop = asyncio.get_running_loop()
        request = _Request(timeline, have_version, wire, loop.create_future())
        with self._lock:
            self._waiting.append(request)
        self._schedule(loop)
        return await request.answer

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._scheduled or not self._waiting:
                return
            self._scheduled = True
        small = sum(flat.nbytes for flat in self._arenas.parameters) <= INLINE_BYTES
        self._stepper.submit(lambda: self._publish(loop), small=small).add_done_callback(self._published)

    def _published(self, job: asyncio.Future[None]) -> None:
        """Tell the readers of a job that the writer refused, or that broke off: nobody else would."""
        error = None if job.cancelled() else job.exception()
        if error is not None:
            with self._lock:
                requests, self._waiting = self._waiting, []
                self._scheduled = False
            for request in requests:
                _settle(request, copy.copy(error))

    def _publish(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            requests, self._waiting = self._waiting, []
            self._scheduled = False
        unmade: list[tuple[DenseFrames, list[Sequence[Source]]]] = []
        crowded = []
        for request in requests:
            try:
                published = self._answer_to(request, unmade)
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to the reader, not to the writer
                loop.call_soon_threadsafe(_settle, request, error)
            else:
                if published is None:
                    crowded.append(request)
                else:
                    loop.call_soon_threadsafe(_settle, request, published)
        for frames, bodies in unmade:
            self._arenas.lane.publish(partial(self._make, frames, bodies, loop))
        if crowded:
            with self._lock:
                self._waiting += crowded
            loop.call_soon_threadsafe(loop.call_later, CROWDED_RETRY_S, self._schedule, loop)

    def _make(
        self, frames: DenseFrames, bodies: Sequence[Sequence[Source]], loop: asyncio.AbstractEventLoop
    ) -> None:
        try:
            frames.make(bodies, loop.call_soon_threadsafe)
        except Exception:  # noqa: BLE001 - its readers are told
            self.forget()

    def _answer_to(
        self, request: _Request, unmade: list[tuple[DenseFrames, list[Sequence[Source]]]]
    ) -> Published | None:
        """In the writer's thread. None: too many older versions are still being read."""
        arenas = self._arenas
        have = request.have_version if request.timeline == arenas.timeline else None
        if have == arenas.version:
            return Published(*self._now(), True, [], None, [])
        dense = self._dense(request.wire, unmade)
        if dense is None:
            return None
        segments, bodies = self._row_tracked(have, request.wire)
        own = list(pack(bodies, first=len(dense.segments)))
        return Published(*self._now(), False, dense.segments + segments, dense, own)

    def _now(self) -> tuple[int, int, Layout]:
        """Timeline, version and layout as the writer has them; the model's may be ahead."""
        return self._arenas.timeline, self._arenas.version, self._arenas.layout

    def _dense(
        self, wire: torch.dtype | None, unmade: list[tuple[DenseFrames, list[Sequence[Source]]]]
    ) -> DenseFrames | None:
        """The frames of this version; if they are new, they and what they hold are noted as yet to be made."""
        arenas = self._arenas
        now = (arenas.timeline, arenas.version)
        if wire in self._current and self._current[wire][0] == now:
            return self._current[wire][1]
        self._current.pop(wire, None)
        live = self._live.setdefault(wire, weakref.WeakSet())
        if len(live) >= LIVE_VERSIONS:
            return None
        runs = dense_runs(arenas, wire)
        bodies = [
            arenas.lane.outgoing(arenas.flat(s.arena)[s.start : s.stop], dtypes.to_torch(s.dtype, ""))
            for s, _ in runs
        ]
        frames = DenseFrames([segment for segment, _ in runs], self._memory)
        live.add(frames)
        self._current[wire] = (now, frames)
        unmade.append((frames, bodies))
        return frames

    def _row_tracked(
        self, have: int | None, wire: torch.dtype | None
    ) -> tuple[list[Segment], list[Sequence[Source]]]:
        arenas = self._arenas
        segments: list[Segment] = []
        bodies: list[Sequence[Source]] = []
        for index in sorted(arenas.row_changed):
            slot = arenas.layout.slots[index]
            changed = arenas.row_changed[index]
            ids = None if have is None else torch.nonzero(changed > have).flatten()
            segment, body = rows_body(arenas, slot, ids, wire)
            segments.append(segment)
            bodies.append(fetched(arenas, body))
        return segments, bodies

    def forget(self) -> None:
        """Drop what was encoded: the arenas were replaced."""
        self._current.clear()


def _settle(request: _Request, result: Published | BaseException) -> None:
    if request.answer.done():
        return
    if isinstance(result, Published):
        request.answer.set_result(result)
    else:
        request.answer.set_exception(result)


def fetched(arenas: Arenas, body: Sequence[Piece]) -> list[Source]:
    """Pieces that may lie on the device as what frames are made from."""
    return [source for piece in body for source in arenas.lane.outgoing(piece.source, piece.dtype)]


def dense_runs(arenas: Arenas, wire: torch.dtype | None) -> list[tuple[Segment, list[Slot]]]:
    """The segments of what is not sent by rows, each with its slots: not to be written to."""
    if not arenas.row_changed:
        return arenas.layout.whole(wire)
    plain = [slot for slot in arenas.layout.slots if slot.index not in arenas.row_changed]
    return arenas.layout.dense_segments(plain, wire)


def rows_body(
    arenas: Arenas, slot: Slot, ids: torch.Tensor | None, wire: torch.dtype | None
) -> tuple[Segment, list[Piece]]:
    """A segment that carries some rows of a parameter, or all of it when that is smaller or `ids` is None."""
    dtype = wire or slot.dtype
    segment = Segment(
        arena=slot.arena, start=slot.start, stop=slot.stop, dtype=dtypes.to_wire(dtype, "segment")
    )
    table = arenas.view(slot)
    whole_bytes = table.numel() * dtype.itemsize
    if ids is None or ids.numel() * (ID_BYTES + slot.row_elements * dtype.itemsize) >= whole_bytes:
        return segment, [Piece(table, dtype)]
    segment.rows = ids.numel()
    return segment, [Piece(ids, torch.int64), Piece(table.index_select(0, ids), dtype)]
