"""The download of a checkpoint: whole, or a part of it if all parts are sure to be of one version.

The model may have moved between two requests for the same URL. A client goes on with a broken download by a Range;
`curl -C -` and `wget -c` send one without saying which content the first part was of. A Range is answered with a part
only if the content cannot be another (`is_fixed`), or if the caller names the content that it has (If-Range).
Otherwise the answer is the whole, which such programs refuse to append.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Final

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pushstep.proto.errors import RangeNotSatisfiable

from ...process.threads import DOWNLOADS
from ...storage.checkpoints import Checkpoint

READ_BYTES: Final = 256 << 10
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Download(StreamingResponse):
    """A response that streams a checkpoint's bytes. `held` is released when it ends, in whichever way."""

    def __init__(
        self,
        request: Request,
        checkpoint: Checkpoint,
        headers: Mapping[str, str],
        *,
        is_fixed: bool,
    ) -> None:
        """`is_fixed`: the content cannot change. RangeNotSatisfiable for a range beyond the end."""
        self.held = AsyncExitStack()
        self._checkpoint = checkpoint
        wanted = request.headers.get("range", "")
        claimed = request.headers.get("if-range")
        if (claimed is None and not is_fixed) or claimed not in (None, checkpoint.etag):
            wanted = ""
        part = part_of(wanted, checkpoint.size_bytes)
        start, stop = part or (0, checkpoint.size_bytes)
        all_headers = {**headers, "ETag": checkpoint.etag, "Content-Length": str(stop - start)}
        if part is not None:
            all_headers["Content-Range"] = f"bytes {start}-{stop - 1}/{checkpoint.size_bytes}"
        super().__init__(
            self._read(start, stop),
            200 if part is None else 206,
            all_headers,
            media_type="application/octet-stream",
        )

    async def _read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        descriptor = self._checkpoint.file.fileno()
        while start < stop:
            chunk = await DOWNLOADS.run(os.pread, descriptor, min(READ_BYTES, stop - start), start)
            if not chunk:
                raise OSError("a checkpoint is shorter than it was")
            start += len(chunk)
            yield chunk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        async with self.held:
            await super().__call__(scope, receive, send)


def part_of(wanted: str, size_bytes: int) -> tuple[int, int] | None:
    """The bytes [start, stop) that a Range header names; None for the whole, also if it is no valid range.

    RangeNotSatisfiable for a range that holds none of the bytes. Several ranges at once are answered with the whole.
    """
    match = _RANGE.fullmatch(wanted.strip())
    if match is None or match.group(1, 2) == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    else:
        start, stop = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None  # RFC 9110: such a header is invalid and is ignored
    if start >= stop:
        raise RangeNotSatisfiable(range=wanted[:100], size=size_bytes)
    return start, stop
