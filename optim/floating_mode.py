"""Whether this thread's processor flushes small numbers to zero, and a stretch in which it does not.

`torch.set_flush_denormal` says so for the thread that calls it, and threads that are started there take it over. Kernels
would give other bits in such threads than in others, so they run in the default mode, whatever the caller's is.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Final

_SMALLEST_NORMAL: Final = sys.float_info.min
_HALF: Final = 0.5
# fenv.h: the mode that a program is started in; and more bytes than any mode has.
_DEFAULT: Final = ctypes.c_void_p(-1)
_MODE_BYTES: Final = 64


def flushes() -> bool:
    """Whether a result that is too small to be normal becomes zero: 30 ns."""
    return _SMALLEST_NORMAL * _HALF == 0.0


def use_default() -> None:
    """Have this thread compute as a program does that has changed nothing."""
    ctypes.CDLL("libm.so.6").fesetmode(_DEFAULT)


@contextlib.contextmanager
def default() -> Iterator[None]:
    """The default mode for the length of a block."""
    library, before = ctypes.CDLL("libm.so.6"), (ctypes.c_uint8 * _MODE_BYTES)()
    library.fegetmode(before)
    library.fesetmode(_DEFAULT)
    try:
        yield
    finally:
        library.fesetmode(before)
