"""The cache of compiled kernels: a process compiles only what no process before it has compiled.

Each kernel has a folder of its own below `folder()`. numba's index maps keys to numbered files. Two processes that add
different kernels to one index at the same time can leave a key that names the other's code. The folder's name holds
everything that tells two kernels apart (sources, specialisation, processor), so all processes write the same thing
there. Of processes that need a kernel at the same time, as ranks that are started together do, one compiles it; the others
wait for it, and load what it has written.

The folder is the first writable one of: NUMBA_CACHE_DIR, the package's own `__pycache__`, the folder given to
`keep_in` (the server's data folder), the user's cache folder. If none is writable, each process compiles its kernels
and logs that once; numba itself would raise.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

log: Final = logging.getLogger(__name__)

# Holds only kernels and this file: a change of any source makes every kernel compile again.
_SOURCES: Final = Path(__file__).parent
_PACKAGE: Final = _SOURCES.parent
# A kernel takes a second at most, on a busy machine some. Whoever has waited longer compiles it, too.
WAIT_S: Final = 20.0
_LOOK_EVERY_S: Final = 0.01
_kept_in: list[Path] = []
_compiled: dict[Hashable, Any] = {}
_lock = threading.RLock()
_here = threading.local()


class NotCompiled(Exception):
    """Raised inside `ONLY_COMPILED` for a kernel that is not in memory yet."""


class _OnlyCompiled:
    def __enter__(self) -> None:
        _here.only_compiled = True

    def __exit__(self, *_: object) -> None:
        _here.only_compiled = False


# A block that does not wait for a compilation: a kernel that is not in memory yet raises NotCompiled.
ONLY_COMPILED: Final = _OnlyCompiled()


def _fresh_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the parent may have forked while another of its threads was compiling


os.register_at_fork(after_in_child=_fresh_lock)


def keep_in(path: str | os.PathLike[str]) -> None:
    """Name a folder for compiled kernels, used when the package's own is read-only."""
    _kept_in[:] = [Path(path)]
    folder.cache_clear()


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        return False
    return True


@cache
def folder() -> Path | None:
    """The folder that holds the compiled kernels; None if nothing is writable."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    home = os.path.expanduser("~")  # "~" itself for a user without a home
    user = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home != "~" else None)
    candidates = [
        *([Path(named)] if named else []),
        _PACKAGE / "__pycache__",
        *_kept_in,
        *([Path(user) / "pushstep"] if user else []),
    ]
    for candidate in candidates:
        if _writable(candidate / "kernels"):
            return candidate / "kernels"
    log.warning("no writable folder for compiled kernels: they are compiled again in every process")
    return None


@cache
def _surroundings() -> str:
    import llvmlite.binding
    import numba

    digest = hashlib.sha256()
    for source in sorted(_SOURCES.rglob("*.py")):
        digest.update(source.read_bytes())
    for text in (
        numba.__version__,
        llvmlite.binding.get_host_cpu_name(),
        os.environ.get("NUMBA_CPU_NAME", ""),
    ):
        digest.update(text.encode())
    digest.update(llvmlite.binding.get_host_cpu_features().flatten().encode())
    return digest.hexdigest()[:16]


def compiled(make: Callable[..., Callable[..., Any]], signature: str, spec: Any) -> Any:
    """The kernel `make(spec)` for `signature`: from memory, from disk, or compiled now and written to disk.

    Inside `ONLY_COMPILED` a kernel that is not in memory raises NotCompiled.
    """
    key = (make, spec)
    kernel = _compiled.get(key)
    if kernel is None:
        if getattr(_here, "only_compiled", False):
            raise NotCompiled(make.__name__)
        with _lock:
            kernel = _compiled.get(key)
            if kernel is None:
                kernel = _compiled[key] = _compile(make, signature, spec)
    return kernel


def _require_plain(own: Path) -> None:
    """Remove a kernel's folder if it holds anything but regular files: numba would wait for ever on a FIFO."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(own) for name in names]
    if not all(map(_is_plain, paths)):
        log.warning("%s holds something else than compiled kernels: it is made anew", own)
        shutil.rmtree(own, ignore_errors=True)


def _is_plain(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return True  # another process has just replaced it


def _compile(make: Callable[..., Callable[..., Any]], signature: str, spec: Any) -> Any:
    root = folder()
    if root is not None:
        name = hashlib.sha256(f"{make.__name__} {spec!r}".encode()).hexdigest()[:16]
        own = root / _surroundings() / f"{make.__name__}-{name}"
        _require_plain(own)
        try:
            with _alone_in(own):
                return _built(make(spec), signature, own)
        except Exception as error:  # noqa: BLE001 - damaged files may raise anything; a bad kernel raises again below
            log.warning("the compiled kernel in %s cannot be used, it is compiled again: %s", own, error)
            shutil.rmtree(own, ignore_errors=True)  # the next process writes it afresh
    return _built(make(spec), signature, None)


@contextlib.contextmanager
def _alone_in(own: Path) -> Iterator[None]:
    """Nobody else compiles this kernel meanwhile, unless it is there: then there is nothing to wait for.

    The lock is the folder's, and goes with the process that holds it.
    """
    own.mkdir(parents=True, exist_ok=True)
    if any(own.iterdir()):
        yield
        return
    folder = os.open(own, os.O_RDONLY)
    try:
        until_s = time.monotonic() + WAIT_S
        while time.monotonic() < until_s:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK_EVERY_S)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(folder)


def _built(function: Callable[..., Any], signature: str, own: Path | None) -> Any:
    """`numba.njit(signature, cache=True)` with a cache folder of its own.

    numba's setting of the folder would hold for the whole process.
    """
    import numba

    njit: Any = numba.njit
    kernel = njit(nogil=True, error_model="numpy")(function)
    if own is not None:
        kernel._cache = _cache_in(own, function)
    with _UNCOLLECTED:
        kernel.compile(signature)
    kernel.disable_compile()
    return kernel


class _Uncollected:
    """A block in which no garbage is collected: of the many objects of a compilation few are, and looking takes a sixth of it."""

    def __enter__(self) -> None:
        self._collects = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._collects:
            gc.enable()


_UNCOLLECTED: Final = _Uncollected()


def _cache_in(own: Path, function: Callable[..., Any]) -> Any:
    from numba.core import caching
    from numba.core.runtime.nrt import rtsys

    class Locator:
        """The cache folder of one kernel. Its name depends on the sources, so the stamp can stay empty."""

        @classmethod
        def from_function(cls, function: Callable[..., Any], file: str) -> Locator:
            return cls()

        def ensure_cache_path(self) -> None:
            own.mkdir(parents=True, exist_ok=True)

        def get_cache_path(self) -> str:
            return str(own)

        def get_source_stamp(self) -> str:
            return ""

        def get_disambiguator(self) -> str:
            return ""

    def key(_: Any, signature: Any, codegen: Any) -> tuple[Any, ...]:
        """What the folder's name leaves open. numba's own key pickles what the function closes over.

        Another function that it calls is never pickled to the same bytes in two processes.
        """
        return (signature, codegen.magic_tuple())

    def load_overload(self: Any, signature: Any, target: Any) -> Any:
        """The compiled kernel, or None.

        numba's own first loads all that it knows to compile, scipy included: 0.35 s of CPU time at the first kernel of a
        process. One that is compiled needs numba's runtime alone; a compilation loads the rest by itself.
        """
        rtsys.initialize(target)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(signature, target)

    impl = type("Impl", (caching.CompileResultCacheImpl,), {"_locator_classes": [Locator]})
    own_way = {"_impl_class": impl, "_index_key": key, "load_overload": load_overload}
    return type("Cache", (caching.FunctionCache,), own_way)(function)
