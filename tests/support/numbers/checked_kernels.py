"""A build of the CPU kernels that looks before it reads or writes: a pytest plugin, `-p checked_kernels`.

numba's own bounds checks see arrays. The kernels take most of their operands as addresses, through `intrinsics.load` and
`store`; those are replaced here, before any kernel is compiled, by ones that raise IndexError unless every byte belongs to
an operand. An operand is a tensor whose address was asked for (`data_ptr`) since the step began, from its first element to
its last. Which bytes those are is kept in a table of one bit per byte, at an address that is the same in every
process, so that the compiled kernels can be kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

PAGE = 1 << 20  # bytes that one block of the table says of
BLOCK = PAGE // 8
BLOCKS = 4096  # the first says no of everything
DIRECTORY_AT = 0x2000_0000_0000  # int32 per page: its block
BLOCKS_AT = 0x2100_0000_0000
ADDRESSES = 1 << 47
_FIXED_NOREPLACE = 0x100000
_NORESERVE = 0x4000


def _mapped(address: int, nbytes: int) -> Any:
    """Memory at an address, of zeros, which costs nothing before it is touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED_NOREPLACE | _NORESERVE
    got = libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if got != address:
        raise MemoryError(f"no {nbytes} bytes at {address:#x}: {ctypes.get_errno()}")
    return (ctypes.c_uint8 * nbytes).from_address(address)


class Operands:
    """The table: which bytes belong to a tensor whose address was asked for."""

    def __init__(self) -> None:
        self._directory = np.frombuffer(_mapped(DIRECTORY_AT, 4 * (ADDRESSES // PAGE)), np.int32)
        self._blocks = np.frombuffer(_mapped(BLOCKS_AT, BLOCK * BLOCKS), np.uint8).reshape(BLOCKS, BLOCK)
        self._used: list[int] = []

    def clear(self) -> None:
        """Nothing is an operand any more."""
        for page in self._used:
            self._blocks[self._directory[page]] = 0
            self._directory[page] = 0
        self._used.clear()

    def add(self, begin: int, end: int) -> None:
        """Bytes [begin, end) belong to an operand."""
        while begin < end:
            page = begin // PAGE
            stop = min(end, (page + 1) * PAGE)
            if not self._directory[page]:
                self._used.append(page)
                assert len(self._used) < BLOCKS
                self._directory[page] = len(self._used)
            block = self._blocks[self._directory[page]]
            bits = np.unpackbits(block[begin % PAGE // 8 : -(-(stop - page * PAGE) // 8)], bitorder="little")
            bits[begin % 8 : begin % 8 + stop - begin] = 1
            block[begin % PAGE // 8 : -(-(stop - page * PAGE) // 8)] = np.packbits(bits, bitorder="little")
            begin = stop


operands = Operands()
_data_ptr = torch.Tensor.data_ptr


def data_ptr(tensor: torch.Tensor) -> int:
    """The address of a tensor, which is an operand from now on."""
    address = _data_ptr(tensor)
    if address and tensor.numel() and tensor.is_cpu:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        operands.add(address, address + (last + 1) * tensor.itemsize)
    return address


def _is_operand(address: int, nbytes: int) -> bool:
    for byte in range(address, address + nbytes):
        block = _word(DIRECTORY_AT + 4 * (byte // PAGE), 4)
        bits = _word(BLOCKS_AT + block * BLOCK + byte % PAGE // 8, 1)
        if not (bits >> (byte % 8)) & 1:
            return False
    return True


_word: Any = None


def install() -> None:
    """Replace what kernels are made of. Before any is imported, or it would have the old ones."""
    global _word
    late = {name for name in sys.modules if name.startswith("pushstep.optim.kernels.")}
    late.discard("pushstep.optim.kernels.cache")
    assert not late, late
    os.environ["NUMBA_OPT"] = "0"  # to be compiled sooner, not to run faster
    import numba
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from pushstep.optim.kernels import cache as kernel_cache
    from pushstep.optim.kernels import intrinsics

    int64 = ir.IntType(64)

    def word(_: Any, address: Any, nbytes: Any) -> Any:
        width = 8 * nbytes.literal_value

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(width).as_pointer())
            return builder.zext(builder.load(pointer), int64)

        return types.int64(address, nbytes), generate

    _word = intrinsic(prefer_literal=True)(word)
    names = {getattr(intrinsics, name): name for name in ("PARAM", "GRAD", "FIRST", "SECOND", "EMA", "COPY")}

    def require(context: Any, builder: Any, address: Any, nbytes: Any, what: str) -> None:
        fits = context.compile_internal(
            builder, _is_operand, types.boolean(types.int64, types.int64), (address, nbytes)
        )
        with cgutils.if_unlikely(builder, builder.not_(fits)):
            context.call_conv.return_user_exc(builder, IndexError, (f"{what} is outside of every operand",))

    def at(builder: Any, address: Any, index: Any, kind: int) -> tuple[Any, Any]:
        size = ir.Constant(int64, {0: 4, 1: 8, 2: 2, 3: 2, 4: 4, 5: 1}[kind])
        return builder.add(address, builder.mul(index, size)), size

    def load(context_: Any, address: Any, index: Any, kind: Any, wide: Any, slot: Any) -> Any:
        signature, inner = intrinsics._load(context_, address, index, kind, wide, slot)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            begin, size = at(builder, args[0], args[1], kind.literal_value)
            require(context, builder, begin, size, f"a read of {names[slot.literal_value]}")
            return inner(context, builder, signature, args)

        return signature, generate

    def store(context_: Any, address: Any, index: Any, value: Any, kind: Any, slot: Any) -> Any:
        signature, inner = intrinsics._store(context_, address, index, value, kind, slot)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            begin, size = at(builder, args[0], args[1], kind.literal_value)
            require(context, builder, begin, size, f"a write of {names[slot.literal_value]}")
            return inner(context, builder, signature, args)

        return signature, generate

    def copy_lines(context_: Any, target: Any, source: Any, count: Any, past_cache: Any) -> Any:
        signature, inner = intrinsics._copy_lines(context_, target, source, count, past_cache)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            nbytes = builder.mul(args[2], ir.Constant(int64, 64))
            require(context, builder, args[1], nbytes, "a read of lines")
            require(context, builder, args[0], nbytes, "a write of lines")
            return inner(context, builder, signature, args)

        return signature, generate

    intrinsics.load = intrinsic(prefer_literal=True)(load)
    intrinsics.store = intrinsic(prefer_literal=True)(store)
    intrinsics.copy_lines = intrinsic(prefer_literal=True)(copy_lines)

    njit = numba.njit
    numba.njit = lambda *arguments, **options: njit(*arguments, boundscheck=True, **options)
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    kept = Path(kernel_cache.__file__).parent / "__pycache__" / "checked" / own
    kernel_cache.folder.cache_clear()
    kernel_cache.folder = lambda: kept  # type: ignore[assignment]
    torch.Tensor.data_ptr = data_ptr  # type: ignore[assignment]
    register_optimizer_step_pre_hook(lambda *_: operands.clear())


install()
