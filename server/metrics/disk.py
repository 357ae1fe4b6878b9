"""How full the disk of the data folder is, asked in a thread that a disk which hangs holds up alone."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Room:
    """A disk's size, and what an ordinary user may still write."""

    free_bytes: int
    total_bytes: int


class DiskWatch:
    """The last answer of the disk. None until it has answered, or when it cannot be asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.found: Room | None = None
        self._asking: threading.Thread | None = None

    def ask(self, wait_s: float) -> None:
        """Ask again, and wait for the answer for so long at most. While an answer is awaited, none is asked for."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._ask, name="disk-watch", daemon=True)
            self._asking.start()
        self._asking.join(wait_s)

    def _ask(self) -> None:
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            self.found = None
        else:
            self.found = Room(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)
