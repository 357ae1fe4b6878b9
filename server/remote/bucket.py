"""A store of objects by URL: whole objects and ranges, each call bounded in time and in memory.

fsspec knows the stores. A call may hang for as long as its library likes, so each runs in a thread of its own and is left
behind when its time is over. No library's error text goes further before the secrets in it are hidden, and none as the cause
of another error, whose traceback would show it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pushstep.proto.errors import SnapshotsAway, StorageFailed

from ..process.secrets import SECRETS
from ..storage import files

log = logging.getLogger("pushstep.remote")
# What is read or written at a time. S3 takes parts of at least 5 MiB, and at most 10,000 of them: 80 GB for one arena's file.
CHUNK_BYTES: Final = 8 << 20
# How long one call may take that moves at most one chunk.
CALL_S: Final = 60.0
# The waits before a call that can be repeated is tried again.
WAITS_S: Final = (0.25, 1.0)
RETRY_AFTER_S: Final = 10.0
LONGEST_TEXT: Final = 300
T = TypeVar("T")


class Bucket:
    """A place in a store, below which all keys lie. All methods block. SnapshotsAway if the store does not do what is asked."""

    def __init__(self, url: str, call_s: float = CALL_S) -> None:
        """StorageFailed if the URL is not one of a store, or its package is not installed."""
        self.shown = shown(url)
        SECRETS.add(_secrets_of(url))
        SECRETS.add_environment(os.environ)
        self._call_s = call_s
        self._files, root = _filesystem(url, self.shown)
        self._root = root.rstrip("/")
        # snapshots whose every byte this process has read back, by prefix
        self.verified: set[str] = set()

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def size_of(self, key: str) -> int:
        """The length of an object. FileNotFoundError if there is none."""
        return int(self._tried(lambda: self._files.info(self._path(key))["size"], key))

    def read(self, key: str, start: int, stop: int) -> bytes:
        """A range of an object, all of it. FileNotFoundError; OSError if the store keeps giving fewer bytes."""

        def get() -> bytes:
            if stop <= start:
                return b""
            found: bytes = self._files.cat_file(self._path(key), start=start, end=stop)
            if len(found) != stop - start:
                raise _Truncated(f"it gives {len(found)} of the {stop - start} bytes from {start} on")
            return found

        try:
            return self._tried(get, key)
        except _Truncated as error:
            raise OSError(errno.EIO, str(error), key) from None

    def read_small(self, key: str, most_bytes: int = CHUNK_BYTES) -> bytes:
        """A small object. FileNotFoundError; OSError if it is longer."""
        size_bytes = self.size_of(key)
        if size_bytes > most_bytes:
            raise OSError(errno.EFBIG, f"longer than {most_bytes} bytes", key)
        return self.read(key, 0, size_bytes)

    def write(self, key: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write an object of parts of at most CHUNK_BYTES each. Raises what the parts do; then it is not there, or damaged."""
        self._make_parents(key)
        file = self._once(lambda: self._files.open(self._path(key), "wb", block_size=CHUNK_BYTES), key)
        try:
            for part in parts:
                self._once(lambda part=part: file.write(part), key)  # type: ignore[misc]
            self._once(file.close, key)
        except BaseException:
            self._discard(file, key)
            raise
        if _is_disk(self._files):
            self._once(lambda: _force(Path(self._path(key)), Path(self._root)), key)

    def _make_parents(self, key: str) -> None:
        """Make the folders of an object, where a store has such: on a disk, or over sftp. Those of objects have none."""
        if _is_disk(self._files):
            self._once(lambda: os.makedirs(os.path.dirname(self._path(key)), exist_ok=True), key)

    def _discard(self, file: Any, key: str) -> None:
        """Let go of an upload, so that the store forgets its parts."""
        discard = getattr(file, "discard", None)
        if discard is not None:
            try:
                self._once(discard, key)
            except (SnapshotsAway, FileNotFoundError):
                log.info("the store did not let go of a broken upload")

    def write_small(self, key: str, content: bytes) -> None:
        """Replace a small object."""
        self.write(key, [content])

    def create_small(self, key: str, content: bytes) -> bool:
        """Write a small object that must not be there, as far as the store can say so. False if it is."""
        self._make_parents(key)

        def create() -> None:
            try:
                self._files.pipe_file(self._path(key), content, mode="create")
            except (TypeError, ValueError, NotImplementedError):  # this store's library knows no such mode
                self._files.pipe_file(self._path(key), content)

        try:
            self._once(create, key)
        except FileExistsError:
            return False
        return True

    def names(self, key: str) -> list[str]:
        """The names right below a key, as the store lists them, which may be late or incomplete."""

        def listed() -> list[str]:
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(key), detail=False)
            except FileNotFoundError:
                return []
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]

        return self._tried(listed, key)

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""

        def remove() -> None:
            try:
                self._files.rm_file(self._path(key))
            except FileNotFoundError:
                return

        self._tried(remove, key)

    def delete_all(self, key: str) -> None:
        """Delete everything below a key, as far as the store lists it."""

        def remove() -> None:
            self._files.invalidate_cache()
            try:
                self._files.rm(self._path(key), recursive=True)
            except FileNotFoundError:
                return

        self._tried(remove, key)

    # Calls.

    def _tried(self, work: Callable[[], T], key: str) -> T:
        """What `work` returns, which may be done again."""
        for wait_s in WAITS_S:
            try:
                return self._once(work, key)
            except (SnapshotsAway, _Truncated):
                time.sleep(wait_s)
        return self._once(work, key)

    def _once(self, work: Callable[[], T], key: str) -> T:
        """What `work` returns. FileNotFoundError, FileExistsError, SnapshotsAway for any other failure of the store's."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(work())
            except BaseException as error:  # noqa: BLE001 - a store's library may raise anything
                failure.append(error)

        thread = threading.Thread(target=run, name="store", daemon=True)
        thread.start()
        thread.join(self._call_s)
        if thread.is_alive():
            raise self.away(f"no answer within {self._call_s:g} s")
        if outcome:
            return outcome[0]
        match failure[0]:
            case _Truncated() as error:
                raise error
            case FileNotFoundError():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key) from None
            case FileExistsError():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), key) from None
            case error:
                raise self.away(in_words(error)) from None

    def away(self, problem: str) -> SnapshotsAway:
        """The error for a store that does not do what is asked."""
        return SnapshotsAway(store=self.shown, problem=problem, retry_after_s=RETRY_AFTER_S)


class _Truncated(Exception):
    """A store has given fewer bytes of an object than it has."""


def in_words(error: BaseException) -> str:
    """An error of a store's library in one line, without secrets."""
    text = files.reason(error) if isinstance(error, Exception) else ""
    return SECRETS.hide(" ".join(f"{type(error).__name__}: {text}".split()))[:LONGEST_TEXT]


def shown(url: str) -> str:
    """A URL without what may be secret: the user, the password, the query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the URL of --snapshots"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _secrets_of(url: str) -> list[str]:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    found = [user, user.partition(":")[2], parts.query, *(value for _, value in parse_qsl(parts.query))]
    return [url, *found] if user or parts.query else []


def _filesystem(url: str, name: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path in it. StorageFailed."""
    import fsspec

    protocol, separator, rest = url.partition("://")
    if not separator or "::" in url or not rest.strip("/"):
        raise _unusable(name, "it is no URL such as s3://bucket/path or file:///path (one store, no chain)")
    if protocol not in fsspec.available_protocols() and protocol not in fsspec.registry:
        raise _unusable(name, f"no store is known for {protocol!r}")
    try:
        made: tuple[Any, str] = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise _unusable(name, _package_of(protocol)) from None
    except Exception as error:  # noqa: BLE001 - a store's library may raise anything
        raise _unusable(name, in_words(error)) from None
    return made


def _package_of(protocol: str) -> str:
    from fsspec.registry import known_implementations

    known = known_implementations.get(protocol, {})
    package = str(known.get("class", protocol)).partition(".")[0]
    return f"{protocol}:// needs a package that is not installed here: pip install {package} ({known.get('err', '')})"


def _unusable(name: str, problem: str) -> StorageFailed:
    return StorageFailed(f"cannot keep snapshots at {name}: {problem}", path=name, problem=problem)


def _is_disk(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _force(path: Path, root: Path) -> None:
    """A disk, alone of all stores, may lose what it has taken: force the file, and the names of its folders, to it."""
    files.fsync(path)
    for folder in path.parents:
        files.fsync(folder)
        if folder in (root, root.parent):
            return
