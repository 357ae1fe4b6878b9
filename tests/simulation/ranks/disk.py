"""What a machine that dies would lose, and shows: bytes of journals that were not forced to the disk, and its boot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pushstep.server.journal import journal
from pushstep.server.journal.chain import journal_files
from pushstep.server.journal.file import JournalFile
from pushstep.server.journal.journal import Journal
from pushstep.server.journal.reserve import Reserve
from pushstep.server.models import saved_models


@contextmanager
def watched(safe_bytes: dict[Path, int], deaths: list[int]) -> Iterator[None]:
    """Keep in `safe_bytes`, by file, how much of each journal is on the disk; on one that sets no room aside.

    `deaths`: of machines. Each is followed by another boot, of all of them. At the end the descriptors are closed that killed
    processes have left: a kernel would have done it.
    """
    make, sync, force = JournalFile.__init__, JournalFile.sync, Journal._force_earlier
    begin, journals, opened_files = Journal.__init__, list[Journal](), list[JournalFile]()

    def opened(self: Journal, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        journals.append(self)

    def made(self: JournalFile, *given: Any) -> None:
        make(self, *given)
        opened_files.append(self)
        safe_bytes[self.path] = self.end

    def synced(self: JournalFile) -> None:
        sync(self)
        safe_bytes[self.path] = self.end

    def forced(self: Journal) -> None:
        force(self)
        for path in journal_files(self.folder, self.model):
            safe_bytes[path] = path.stat().st_size

    def none_aside(self: Reserve, end: int, stop: int) -> None:
        self.is_possible = False

    def boot() -> bytes:
        return len(deaths).to_bytes(16)

    with (
        patch.object(journal, "boot", boot),
        patch.object(saved_models, "boot", boot),
        patch.object(Journal, "__init__", opened),
        patch.object(JournalFile, "__init__", made),
        patch.object(JournalFile, "sync", synced),
        patch.object(Journal, "_force_earlier", forced),
        # it would take most of the time of a run
        patch.object(Reserve, "_extend", none_aside),
    ):
        try:
            yield
        finally:
            for file in opened_files:
                if file._is_open:
                    file.close()
            for left in journals:
                if not left._closed:
                    os.close(left._folder)
                    os.close(left._marker)
