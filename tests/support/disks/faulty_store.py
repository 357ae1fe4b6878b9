"""A server whose store of snapshots fails as a test says, by fsspec's name `faulty`.

    python faulty_store.py [SERVER OPTIONS]

`faulty://user:password/PATH` is a folder on the disk. What the file `store` in it says happens to every call, until it is gone:
`away` (a connection that is refused), `hang`, `short` (ranges come without their last byte), `deny`. `write:away` and so on
strike writes only; `after:N:away` lets N calls pass first.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pushstep.server.__main__ import main
from pushstep.server.remote import bucket

SECRET = "password-of-the-store"
HANG_S = 3.0


class FaultyFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A folder that is a store."""

    protocol = "faulty"
    control = Path()
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = str(path).removeprefix("faulty://")
        return str(LocalFileSystem._strip_protocol(text.partition("@")[2] if "@" in text else text))

    def _strike(self, *, writes: bool) -> str:
        try:
            what = self.control.read_text()
        except FileNotFoundError:
            type(self).calls = 0
            return ""
        if what.startswith("after:"):
            _, count, what = what.split(":", 2)
            type(self).calls += 1
            if self.calls <= int(count):
                return ""
        if what.startswith("write:"):
            what = what.removeprefix("write:") if writes else ""
        match what:
            case "away":
                raise ConnectionRefusedError(f"cannot connect as {SECRET} to https://store?sig={SECRET}")
            case "deny":
                raise PermissionError(f"the key {SECRET} is not known")
            case "hang":
                time.sleep(HANG_S)
        return what

    def open(self, path: Any, mode: str = "rb", **options: Any) -> Any:
        self._strike(writes="w" in mode)
        return super().open(path, mode, **options)

    def info(self, path: Any, **options: Any) -> Any:
        self._strike(writes=False)
        return super().info(path, **options)

    def ls(self, path: Any, detail: bool = False, **options: Any) -> Any:
        self._strike(writes=False)
        return super().ls(path, detail, **options)

    def rm_file(self, path: Any) -> None:
        self._strike(writes=True)
        super().rm_file(path)

    def cat_file(self, path: Any, start: Any = None, end: Any = None, **options: Any) -> bytes:
        what = self._strike(writes=False)
        found: bytes = super().cat_file(path, start, end, **options)
        return found[:-1] if what == "short" else found


if __name__ == "__main__":
    url = sys.argv[sys.argv.index("--snapshots") + 1]
    FaultyFileSystem.control = Path(url.partition("@")[2]) / "store"
    fsspec.register_implementation("faulty", FaultyFileSystem)
    # a call that hangs is given up after this
    bucket.Bucket.__init__.__defaults__ = (HANG_S / 3,)
    sys.argv[0] = "pushstep-server"
    main()
