"""A real disk of few bytes: a tmpfs that only one process and those that enter its mount namespace see."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers.harness import SERVER

MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && exec cat'


class SmallDisk:
    """A folder that is a small disk to those whom `command` starts."""

    def __init__(self, holder: subprocess.Popen[str], folder: Path) -> None:
        self._holder = holder
        # the same folder as it is seen from outside
        self.folder = Path(f"/proc/{holder.pid}/root{folder}")

    @property
    def command(self) -> tuple[str | Path, ...]:
        """Starts a server there."""
        return ("nsenter", "-t", str(self._holder.pid), "-m", SERVER)

    def fill(self, leave_bytes: int = 0) -> Path:
        """Take all of its room but some, with a file: remove it to make room."""
        filler = self.folder / f"filler-{leave_bytes}"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            disk = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - leave_bytes))
            while not leave_bytes:
                file.seek(0, os.SEEK_END)
                file.write(bytes(4096))
        return filler


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mount one at a folder, for a block. It is gone with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", MOUNT, "sh", str(size_bytes), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if holder.stdout is None or holder.stdout.readline() != "mounted\n":
            raise PermissionError("this machine mounts nothing for this user")
        yield SmallDisk(holder, folder)
    finally:
        holder.communicate()


def may_mount(folder: Path) -> bool:
    """True if this machine lets this user do all of that."""
    try:
        with small_disk(folder, 1 << 20) as disk:
            return os.statvfs(disk.folder).f_blocks * os.statvfs(disk.folder).f_frsize == 1 << 20
    except OSError:
        return False
