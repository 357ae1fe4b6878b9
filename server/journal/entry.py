"""One record on its way into a journal: made on the event loop, appended by the model's writer thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from pushstep.proto.errors import PushstepError
from pushstep.proto.journal_pb2 import JournalRecord

from .journal import Journal
from .records import payload_of

log = logging.getLogger("pushstep.journal")
# How long a record waits that the disk has refused, until it is tried again.
AGAIN_S: Final = 0.25


class Entry:
    """One record. The writer thread appends it before the change that it describes."""

    def __init__(
        self,
        journal: Journal,
        record: JournalRecord,
        tensors: Sequence[Tensor] = (),
        then: Callable[[], None] | None = None,
    ) -> None:
        """`then` is called once it was appended, in the writer thread."""
        self._journal = journal
        # the level when it was decided, which its receipts name
        self.level = journal.level
        self._then = then
        self.record = record
        self._tensors = tensors
        # its number, once it was appended
        self.number = 0

    def append(self) -> None:
        """Append it. DiskFull, StorageFailed."""
        begun_s = time.monotonic()
        self.number = self._journal.append(self.record, payload_of(self._tensors))
        self._tensors = ()
        if self._then is not None:
            self._then()
        self._journal.counts.append.observe(time.monotonic() - begun_s)

    def append_at_last(self, gives_up: Callable[[], bool]) -> None:
        """Append it, however long the disk refuses: what it says has happened, and later records follow from it.

        Raises the last refusal once `gives_up` says so.
        """
        while True:
            try:
                self.append()
            except PushstepError as error:
                if gives_up():
                    raise
                log.error("the journal waits for its disk: %s", error.message)
                time.sleep(AGAIN_S)
            else:
                return
