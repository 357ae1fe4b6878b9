"""An early push: its bytes leave during backward, before it is certain that the push will be made.

The stream opens with a header that declares every segment, and chunks follow as gradients become ready. The commit,
which carries what is known only at the end, makes it a push like any other. Until the commit the server has only
staged it: a stream that is withdrawn, cut or stalled leaves nothing behind, and the gradients are sent again as a plain
push. A retry under the same identity is plain too. It has the same segments in the same order, so its digest is the
same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Final

from pushstep.proto import training_pb2 as pb
from pushstep.proto.wire.frames import Piece
from pushstep.proto.wire.layout import Layout

from ..transport.channel import Transport
from ..transport.shield import shield
from ..transport.streams import Body, Pulled

# how often a wait checks whether the user has interrupted it
_LOOK_S: Final = 0.1
Pieces = Sequence[Sequence[Piece]]


class EarlyPush:
    """One open stream: `hand` feeds it, `seal` waits until all is sent, `finish` or `withdraw` ends it."""

    def __init__(self, transport: Transport, header: pb.PushHeader, layout: Layout) -> None:
        self.body = Body(tuple(header.segments), ())
        self._header = header
        self._handed: SimpleQueue[Pieces | None] = SimpleQueue()
        self._commit: SimpleQueue[pb.PushCommit | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._sealed = threading.Event()
        self._digest: int | None = None
        self._exchange = transport.begin_exchange(
            header, header.segments, self._pieces(), self._committed, layout
        )
        self._exchange.when_over(lambda: self._seal(None))

    def hand(self, pieces: Pieces) -> None:
        """Send the pieces of the next segments."""
        self._handed.put(pieces)

    def is_as(self, header: pb.PushHeader) -> bool:
        """Whether its header, without segments, equals that of a push that would be made now."""
        mine = pb.PushHeader()
        mine.CopyFrom(self._header)
        del mine.segments[:]
        return mine == header

    def seal(self) -> int | None:
        """Wait until all is sent; the digest of what was sent. None if the stream ended before."""
        while not self._sealed.wait(_LOOK_S):
            shield.check(patient=True)
        return self._digest

    def finish(self, commit: pb.PushCommit) -> Pulled:
        """Send the commit and wait for the answer."""
        self._commit.put(commit)
        pulled: Pulled = self._exchange.result()
        return pulled

    def withdraw(self) -> None:
        """End the stream without a commit; does nothing if it has ended."""
        self._exchange.cancel()
        self._seal(None)
        # the thread that makes the messages waits at one of these
        self._handed.put(None)
        self._commit.put(None)

    # In gRPC's thread, which makes the messages.

    def _pieces(self) -> Iterator[Sequence[Piece]]:
        left = len(self.body.segments)
        while left:
            pieces = self._handed.get()
            if pieces is None:
                return
            left -= len(pieces)
            yield from pieces

    def _committed(self, digest: int) -> pb.PushCommit | None:
        self._seal(digest)
        return self._commit.get()

    def _seal(self, digest: int | None) -> None:
        with self._lock:
            if not self._sealed.is_set():
                self._digest = digest
                self._sealed.set()
