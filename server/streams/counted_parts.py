"""A message that comes in parts. Each part is counted in the budget before it is kept."""

from __future__ import annotations

import time
from typing import Final, TypeVar

from google.protobuf.message import Message

from pushstep.proto.errors import StreamStalled
from pushstep.proto.training_pb2 import JoinPart
from pushstep.proto.wire.parts import Parts

from ..process.threads import REQUESTS
from ..staging.budget import Budget
from .received import parse, received
from .timed_messages import TimedMessages

M = TypeVar("M", bound=Message)
# Budget bytes for each byte of a manifest while it is read: two copies, and the parsed message. A million parameters
# with names of 20 bytes take 30 MB on the wire and 200 MB parsed.
PARSED_BYTES_PER_BYTE: Final = 10
# All parts must come within this time, plus a second for each MiB: others need the budget that they hold.
PARTS_S: Final = 60.0
LEAST_BYTES_PER_S: Final = 1 << 20


class CountedParts:
    """The parts of one message, and the budget bytes that they take until `release`."""

    def __init__(self, what: str, budget: Budget) -> None:
        self._parts = Parts(what)
        self._budget = budget
        self._reserved = 0
        self._begun_s = time.monotonic()

    def add(self, part: bytes) -> None:
        """Keep the next part. OverBudget or TooLong without room, StreamStalled if parts come too slowly."""
        until_s = self._begun_s + PARTS_S + self._parts.size_bytes / LEAST_BYTES_PER_S
        if time.monotonic() > until_s:
            raise StreamStalled(seconds=PARTS_S)
        need = len(part) * PARSED_BYTES_PER_BYTE
        self._budget.reserve_for_parts(need)
        self._reserved += need
        self._parts.add(part)

    async def read(self, messages: TimedMessages) -> None:
        """Read the parts of a join until the stream ends."""
        messages.begin_window()
        while (message := await messages.next()) is not None:
            self.add((await received(JoinPart, message)).part)

    async def parsed(self, kind: type[M], rest: M | None = None) -> M:
        """The parsed and checked message. The fields of `rest` follow those of the parts."""
        return await REQUESTS.run(self._parse, kind, rest)

    def _parse(self, kind: type[M], rest: M | None) -> M:
        whole = self._parts.take()
        return parse(kind, whole if rest is None else whole + rest.SerializeToString())

    def release(self) -> None:
        """Give the budget bytes back. A second call does nothing."""
        reserved, self._reserved = self._reserved, 0
        if reserved:
            self._budget.release_of_parts(reserved)
