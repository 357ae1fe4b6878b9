"""Sends parameters out: one version's frames are encoded once per wire dtype and shared by all readers.

A pull never reads a version that is being written, because encoding runs in the writer thread between two steps. (A GPU's
parameters are copied there, and encoded in another thread.) The first frames are sent while the last are being encoded.
Readers that ask while the writer is busy are answered together. Row-sparse parameters are sent as the rows that changed
since the reader's version, or whole where that is smaller. Readers that have the same version share those frames, which
count in the readers' budget.

Frames of older versions live on while readers are being sent them, at most LIVE_VERSIONS. A version of which no reader
has taken anything for SLOW_S moves into the readers' budget and out of that count. So readers that are slow, or do not
read at all, hold up no others.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from pushstep.proto.errors import OverBudget
from pushstep.proto.errors.status import untrace
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.buffers import MessagePool
from pushstep.proto.wire.frames import Source, pack
from pushstep.proto.wire.layout import Layout

from ..process.inline import INLINE_BYTES
from ..staging.read_budget import ReadBudget
from .arena import Arenas
from .version_frames import DenseFrames, RowFrames, changed_rows, dense_runs, rows_bytes, rows_sources
from .writer import ModelWriter

# Versions whose frames exist at once, per wire dtype. Beyond that the next version waits.
LIVE_VERSIONS: Final = 3
CROWDED_RETRY_S: Final = 0.01
Loop = asyncio.AbstractEventLoop
# frames that are to be made before the next step, and what they are made of
Unmade = list[tuple[DenseFrames, list[Sequence[Source]]]]
# A reader on this host takes a message in milliseconds, one on a link of 4 MB/s in half a second.
SLOW_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Published:
    """What one reader is sent: all of one version, or nothing because the reader has it."""

    timeline: int
    version: int
    layout: Layout
    unchanged: bool
    segments: list[Segment]
    dense: DenseFrames | None
    rows: RowFrames | None
    # the segments lie in the reader's own region: nothing is sent
    shared: bool = False

    def made(self) -> Sequence[bytes] | None:
        """All frames, in the order of the segments, if none is still to be made."""
        dense = [] if self.dense is None else self.dense.made()
        return dense if dense is None or self.rows is None else [*dense, *self.rows.frames]

    async def frames(self) -> AsyncIterator[bytes]:
        """All frames, in the order of the segments."""
        if self.dense is not None:
            async for frame in self.dense:
                yield frame
        if self.rows is not None:
            for frame in self.rows.frames:
                yield frame


@dataclass(slots=True)
class _Request:
    timeline: int | None
    have_version: int | None
    wire: torch.dtype | None
    joined: bool  # whether it takes chunks that go on into the segments behind their own
    answer: asyncio.Future[Published]
    # how long it may wait for room
    until_s: float


class Publisher:
    """Publishes the versions of one model to its readers."""

    def __init__(
        self,
        arenas: Arenas,
        writer: ModelWriter,
        budget: ReadBudget,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arenas = arenas
        self._writer = writer
        self._budget = budget
        self._clock = clock
        self._lock = threading.Lock()  # guards _waiting and _scheduled, between the loop and the writer
        self._waiting: list[_Request] = []
        self._scheduled = False
        self._current: dict[torch.dtype | None, tuple[tuple[int, int], DenseFrames]] = {}
        self._live: dict[torch.dtype | None, weakref.WeakSet[DenseFrames]] = {}
        # by wire dtype, the version that its readers have, and whether chunks are joined
        self._rows: weakref.WeakValueDictionary[tuple[torch.dtype | None, int | None, bool], RowFrames] = (
            weakref.WeakValueDictionary()
        )
        self._rows_of = (0, 0)
        self._memory = MessagePool()
        # somebody has asked since the last `rest`
        self._is_asked = False

    async def newest(
        self,
        timeline: int | None,
        have_version: int | None,
        wire: torch.dtype | None,
        *,
        joined: bool = False,
    ) -> Published:
        """The newest version when the writer gets to the request, for a reader that has `have_version`; see `_Request`.

        OverBudget if other readers hold so many versions, or so many bytes, that there is no room for it soon.
        """
        loop = asyncio.get_running_loop()
        self._is_asked = True
        if self._is_small() and self._writer.is_idle:
            published = self._at_once(timeline, have_version, wire, joined, loop)
            if published is not None:
                return published
        until_s = self._clock() + self._budget.wait_s
        request = _Request(timeline, have_version, wire, joined, loop.create_future(), until_s)
        with self._lock:
            self._waiting.append(request)
        self._schedule(loop)
        return await request.answer

    def _is_small(self) -> bool:
        return sum([flat.nbytes for flat in self._arenas.parameters]) <= INLINE_BYTES

    def _at_once(
        self,
        timeline: int | None,
        have_version: int | None,
        wire: torch.dtype | None,
        joined: bool,
        loop: Loop,
    ) -> Published | None:
        """What the writer would do, where it has nothing else to do. None if there is no room now."""
        unmade: Unmade = []
        published = self._answer_to(timeline, have_version, wire, joined, unmade)
        for frames, bodies in unmade:
            self._make(frames, bodies, loop)
        return published

    def this_version(
        self, timeline: int, have_version: int | None, wire: torch.dtype | None, loop: Loop
    ) -> Published | None:
        """In the writer thread: the version that is here now, for a reader that has `have_version`. None without room.

        Other readers do not keep it waiting: a version too many counts in their budget.
        """
        unmade: Unmade = []
        published = self._answer_to(timeline, have_version, wire, False, unmade, crowds=True)
        for frames, bodies in unmade:
            self._arenas.device_stream.publish(partial(self._make, frames, bodies, loop))
        return published

    def over(self) -> OverBudget:
        """The error for a reader for whose version there is no room."""
        return self._budget.over(sum(flat.nbytes for flat in self._arenas.parameters))

    def _schedule(self, loop: Loop) -> None:
        with self._lock:
            if self._scheduled or not self._waiting:
                return
            self._scheduled = True
        job = self._writer.submit(lambda: self._publish(loop), small=self._is_small())
        if job.done():
            self._published(job)
        else:
            job.add_done_callback(self._published)

    def _published(self, job: asyncio.Future[None]) -> None:
        """Pass on the error of a job that was refused or failed, or its readers would wait for ever."""
        error = None if job.cancelled() else job.exception()
        if error is not None:
            with self._lock:
                requests, self._waiting = self._waiting, []
                self._scheduled = False
            untrace(error)
            for request in requests:
                _resolve(request, copy.copy(error))

    def _publish(self, loop: Loop) -> None:
        with self._lock:
            requests, self._waiting = self._waiting, []
            self._scheduled = False
        on_loop = _caller_on(loop)
        unmade: Unmade = []
        crowded = []
        for request in requests:
            if request.answer.done():  # its reader has gone
                continue
            try:
                published = self._answer_to(
                    request.timeline, request.have_version, request.wire, request.joined, unmade
                )
                if published is None and self._clock() > request.until_s:
                    raise self.over()
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to the reader, not to the writer
                untrace(error)
                on_loop(_resolve, request, error)
            else:
                if published is None:
                    crowded.append(request)
                else:
                    on_loop(_resolve, request, published)
        for frames, bodies in unmade:
            self._arenas.device_stream.publish(partial(self._make, frames, bodies, loop))
        if crowded:
            with self._lock:
                self._waiting += crowded
            loop.call_soon_threadsafe(loop.call_later, CROWDED_RETRY_S, self._schedule, loop)

    def _make(self, frames: DenseFrames, bodies: Sequence[Sequence[Source]], loop: Loop) -> None:
        try:
            frames.make(bodies, _caller_on(loop))
        except Exception as error:  # noqa: BLE001 - its readers are told
            untrace(error)
            self.forget()

    def _answer_to(
        self,
        timeline: int | None,
        have_version: int | None,
        wire: torch.dtype | None,
        joined: bool,
        unmade: Unmade,
        *,
        crowds: bool = False,
    ) -> Published | None:
        """The answer to a request, in the writer thread.

        None if there is no room, because others are still read.
        """
        arenas = self._arenas
        have = have_version if timeline == arenas.timeline else None
        if have == arenas.version:
            return Published(*self._now(), True, [], None, None)
        dense = self._dense(wire, unmade, crowds)
        if dense is None:
            return None
        if not arenas.row_changes.versions:
            return Published(*self._now(), False, dense.segments, dense, None)
        rows = self._row_tracked(have, wire, joined, len(dense.segments))
        if rows is None:
            return None
        return Published(*self._now(), False, dense.segments + rows.segments, dense, rows)

    def _now(self) -> tuple[int, int, Layout]:
        """Timeline, version and layout as the writer has them; the model's may be ahead."""
        return self._arenas.timeline, self._arenas.version, self._arenas.layout

    def _dense(self, wire: torch.dtype | None, unmade: Unmade, crowds: bool) -> DenseFrames | None:
        """The frames of this version; new ones are added to `unmade` with their sources.

        None if there is no room.
        """
        arenas = self._arenas
        now = (arenas.timeline, arenas.version)
        if wire in self._current and self._current[wire][0] == now:
            return self._current[wire][1]
        self._current.pop(wire, None)
        live = self._live.setdefault(wire, weakref.WeakSet())
        is_one_more = len(live) >= LIVE_VERSIONS and not self._retire(live)
        if is_one_more and not crowds:
            return None
        runs = dense_runs(arenas, wire)
        bodies = [
            arenas.device_stream.outgoing(
                arenas.flat(s.arena)[s.start : s.stop], dtypes.to_torch(s.dtype, "")
            )
            for s, _ in runs
        ]
        frames = DenseFrames([segment for segment, _ in runs], self._memory, self._clock)
        if not is_one_more:
            live.add(frames)
        elif self._budget.take(frames.nbytes):
            weakref.finalize(frames, self._budget.give_back, frames.nbytes).atexit = False
        else:
            return None
        self._current[wire] = (now, frames)
        unmade.append((frames, bodies))
        return frames

    def _retire(self, live: weakref.WeakSet[DenseFrames]) -> bool:
        """Move the version that was read the longest ago into the readers' budget, if that is slow.

        True: there is room.
        """
        slowest = min(live, key=lambda frames: frames.moved_s, default=None)
        if slowest is None:  # all have gone meanwhile
            return True
        nbytes = slowest.nbytes
        # sooner than the time that the next version's readers may wait
        slow_s = min(SLOW_S, self._budget.wait_s / 2)
        if self._clock() - slowest.moved_s < slow_s or not self._budget.take(nbytes):
            return False
        live.discard(slowest)
        weakref.finalize(slowest, self._budget.give_back, nbytes).atexit = False
        return True

    def _row_tracked(
        self, have: int | None, wire: torch.dtype | None, joined: bool, first: int
    ) -> RowFrames | None:
        """What is sent by rows to readers that have version `have`. None if there is no room now; OverCapacity if never."""
        arenas = self._arenas
        now = (arenas.timeline, arenas.version)
        if now != self._rows_of:
            self._rows_of = now
            self._rows.clear()
        known = self._rows.get((wire, have, joined))
        if known is not None:
            return known
        ids = {index: arenas.row_changes.after(index, have) for index in sorted(arenas.row_changes.versions)}
        nbytes = sum(rows_bytes(arenas.layout.slots[index], found, wire) for index, found in ids.items())
        if not self._budget.take(nbytes):
            if nbytes > self._budget.total_bytes:
                raise self._budget.too_large(nbytes)
            return None
        try:
            slots = arenas.layout.slots
            some = [changed_rows(arenas, slots[index], found, wire) for index, found in ids.items()]
            segments = [segment for segment, _, _ in some]
            made = list(pack(rows_sources(arenas, some), first=first, joined=joined))
            self._rows[wire, have, joined] = rows = RowFrames(segments, made, self._budget, nbytes)
        except BaseException:
            self._budget.give_back(nbytes)
            raise
        return rows

    def rest(self) -> asyncio.Future[None] | None:
        """Drop the encoded frames of a large version, if nobody has asked for one since the last call. Done with the result."""
        rests, self._is_asked = not self._is_asked, False
        if not rests or not self._current or self._is_small():
            return None
        return self._writer.submit(self._let_go, reads=False)

    def _let_go(self) -> None:
        self.forget()
        self._memory.give_back([])  # where the frames' end has put their memory

    def forget(self) -> None:
        """Drop the encoded frames: the arenas were replaced."""
        self._current.clear()
        self._rows.clear()


def _caller_on(loop: Loop) -> Callable[..., object]:
    """What makes a call on the event loop: at once if the loop runs in this thread, as for small versions."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return loop.call_soon_threadsafe
    return _at_once


def _at_once(call: Callable[..., object], *arguments: object) -> None:
    call(*arguments)


def _resolve(request: _Request, result: Published | BaseException) -> None:
    if request.answer.done():
        return
    if isinstance(result, Published):
        request.answer.set_result(result)
    else:
        request.answer.set_exception(result)
