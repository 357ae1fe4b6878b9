"""Instructions that numba lacks: typed loads and stores at an address, fma, and bit-exact half types.

A kernel receives addresses, not arrays, so one compiled loop serves a table of a thousand tensors. Every memory
operand has a slot, and each slot is its own alias scope. The callers guarantee that parameter, gradient and states do
not overlap. The scopes tell LLVM so, and it vectorises without comparing pointers at run time.

Half types are moved as 16-bit integers and converted by integer arithmetic. LLVM's own `fpext half` crashes on
processors without F16C, and its bfloat support differs between versions. Stores round to nearest even.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

# Element kinds, closed over by the kernels.
FLOAT32: Final = 0
FLOAT64: Final = 1
BFLOAT16: Final = 2
FLOAT16: Final = 3
# Kinds of quantised blocks: a float32 at any address, and an integer from -128 to 127.
SCALE: Final = 4
CODE: Final = 5

# Slots: one per memory operand of a kernel.
PARAM: Final = 0
GRAD: Final = 1
FIRST: Final = 2
SECOND: Final = 3
EMA: Final = 4
COPY: Final = 5
SLOTS: Final = 6

# A plan of slices (see `cpu/pool.py`), in int64: number of workers, slice size, total; then each worker's next slice
# and the end of its stretch. Each worker has a cache line of its own.
STRIDE: Final = 8

# Odd multipliers, one for each 64-bit word of a line.
LINE_FACTORS: Final = tuple((0x9E3779B97F4A7C15 * (2 * k + 1)) % 2**64 for k in range(8))
# A word is folded by this shift before it is multiplied. With a multiple of 8 the sign bits of neighbouring floats
# would cancel each other.
WORD_SHIFT: Final = 29

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_MEMORY: Final = {FLOAT32: _F32, FLOAT64: _F64, BFLOAT16: _I16, FLOAT16: _I16, SCALE: _F32, CODE: _I8}
_ALIGNED: Final = {FLOAT32: 4, FLOAT64: 8, BFLOAT16: 2, FLOAT16: 2, SCALE: 1, CODE: 1}


def _word(value: int) -> Any:
    return ir.Constant(_I32, value)


def _scope(module: Any, instruction: Any, slot: int) -> None:
    domain = module.add_metadata(["pushstep"])
    scopes = [module.add_metadata([f"slot {k}", domain]) for k in range(SLOTS)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[slot]]))
    others = [scope for k, scope in enumerate(scopes) if k != slot]
    instruction.set_metadata("noalias", module.add_metadata(others))


def _pointer(builder: Any, address: Any, index: Any, kind: int) -> Any:
    base = builder.inttoptr(address, _MEMORY[kind].as_pointer())
    return builder.gep(base, [index])


def _float16_to_float32(b: Any, bits: Any) -> Any:
    magnitude = b.shl(b.and_(bits, _word(0x7FFF)), _word(13))
    exponent = b.and_(magnitude, _word(0x7C00 << 13))
    normal = b.add(magnitude, _word((127 - 15) << 23))
    special = b.add(normal, _word((128 - 16) << 23))
    # A subnormal gets an exponent that it lacks. A subtraction takes it away again, which normalises exactly.
    magic = _word(113 << 23)
    shifted = b.bitcast(b.add(normal, _word(1 << 23)), _F32)
    subnormal = b.bitcast(b.fsub(shifted, b.bitcast(magic, _F32)), _I32)
    wide = b.select(b.icmp_unsigned("==", exponent, _word(0)), subnormal, normal)
    wide = b.select(b.icmp_unsigned("==", exponent, _word(0x7C00 << 13)), special, wide)
    sign = b.shl(b.and_(bits, _word(0x8000)), _word(16))
    return b.bitcast(b.or_(wide, sign), _F32)


def _float32_to_float16(b: Any, value: Any) -> Any:
    bits = b.bitcast(value, _I32)
    sign = b.and_(bits, _word(0x80000000))
    magnitude = b.xor(bits, sign)
    odd = b.and_(b.lshr(magnitude, _word(13)), _word(1))
    rounded = b.add(b.add(magnitude, _word((((15 - 127) << 23) + 0xFFF) & 0xFFFFFFFF)), odd)
    normal = b.lshr(rounded, _word(13))
    # Adding this number leaves the rounded subnormal in the low bits.
    magic = _word(((127 - 15) + (23 - 10) + 1) << 23)
    shifted = b.fadd(b.bitcast(magnitude, _F32), b.bitcast(magic, _F32))
    subnormal = b.sub(b.bitcast(shifted, _I32), magic)
    narrow = b.select(b.icmp_unsigned("<", magnitude, _word(113 << 23)), subnormal, normal)
    narrow = b.select(b.icmp_unsigned(">=", magnitude, _word((127 + 16) << 23)), _word(0x7C00), narrow)
    narrow = b.select(b.icmp_unsigned(">", magnitude, _word(0x7F800000)), _word(0x7E00), narrow)
    return b.trunc(b.or_(narrow, b.lshr(sign, _word(16))), _I16)


def _float32_to_bfloat16(b: Any, value: Any) -> Any:
    bits = b.bitcast(value, _I32)
    odd = b.and_(b.lshr(bits, _word(16)), _word(1))
    rounded = b.lshr(b.add(b.add(bits, _word(0x7FFF)), odd), _word(16))
    is_nan = b.icmp_unsigned(">", b.and_(bits, _word(0x7FFFFFFF)), _word(0x7F800000))
    return b.trunc(b.select(is_nan, _word(0x7FC0), rounded), _I16)


def _widen(b: Any, raw: Any, kind: int, wide: bool) -> Any:
    if kind == BFLOAT16:
        raw = b.bitcast(b.shl(b.zext(raw, _I32), _word(16)), _F32)
    elif kind == FLOAT16:
        raw = _float16_to_float32(b, b.zext(raw, _I32))
    elif kind == CODE:
        raw = b.sitofp(raw, _F32)
    if wide and raw.type == _F32:
        return b.fpext(raw, _F64)
    if not wide and raw.type == _F64:
        return b.fptrunc(raw, _F32)
    return raw


def _narrow(b: Any, value: Any, kind: int) -> Any:
    if kind == FLOAT64:
        return b.fpext(value, _F64) if value.type == _F32 else value
    if value.type == _F64:
        value = b.fptrunc(value, _F32)
    if kind == BFLOAT16:
        return _float32_to_bfloat16(b, value)
    if kind == FLOAT16:
        return _float32_to_float16(b, value)
    if kind == CODE:
        return b.trunc(b.fptosi(value, _I32), _I8)
    return value


def _load(_: Any, address: Any, index: Any, kind: Any, wide: Any, slot: Any) -> Any:
    k, w, s = kind.literal_value, bool(wide.literal_value), slot.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = builder.load(_pointer(builder, args[0], args[1], k), align=_ALIGNED[k])
        _scope(builder.module, raw, s)
        return _widen(builder, raw, k, w)

    result = types.float64 if w else types.float32
    return result(address, index, kind, wide, slot), generate


def _store(_: Any, address: Any, index: Any, value: Any, kind: Any, slot: Any) -> Any:
    k, s = kind.literal_value, slot.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = _narrow(builder, args[2], k)
        raw = builder.store(narrow, _pointer(builder, args[0], args[1], k), align=_ALIGNED[k])
        _scope(builder.module, raw, s)
        return context.get_dummy_value()

    return types.void(address, index, value, kind, slot), generate


def _through(_: Any, value: Any, kind: Any) -> Any:
    k = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = args[0].type == _F64
        return _widen(builder, _narrow(builder, args[0], k), k, wide)

    return value(value, kind), generate


def _fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return (a(a, b, c), generate) if a == b == c else None


def _prefetch(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer_type = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer_type, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer_type], kind)
        pointer = builder.inttoptr(args[0], pointer_type)
        builder.call(function, [pointer, _word(1), _word(3), _word(1)])  # for writing, keep, data
        return context.get_dummy_value()

    return types.void(address), generate


def _take(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(address), generate


def _copy_lines(_: Any, target: Any, source: Any, count: Any, past_cache: Any) -> Any:
    past = bool(past_cache.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, of, lines = args[:3]
        line = ir.VectorType(_I64, 8).as_pointer()
        mark = builder.module.add_metadata([_word(1)])
        with cgutils.for_range(builder, lines) as loop:
            at = builder.mul(loop.index, ir.Constant(_I64, 64))
            read = builder.load(builder.inttoptr(builder.add(of, at), line), align=1)
            written = builder.store(read, builder.inttoptr(builder.add(to, at), line), align=64)
            if past:
                written.set_metadata("nontemporal", mark)
        if past:
            # Later stores may overtake nontemporal ones: a thread that is told of the copy must find all of it.
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(target, source, count, past_cache), generate


def _copy_bytes(_: Any, target: Any, source: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, of = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, to, of, args[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(target, source, count), generate


def _load_integer(_: Any, address: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load(builder.gep(base, [args[1]]), align=1)

    return types.int64(address, index), generate


def _store_integer(_: Any, address: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.inttoptr(args[0], _I64.as_pointer())
        builder.store(args[2], builder.gep(base, [args[1]]), align=1)
        return context.get_dummy_value()

    return types.void(address, index, value), generate


def _load_plain(bits: int) -> Any:
    def typed(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            raw = builder.load(pointer, align=1)
            return raw if bits == 64 else builder.zext(raw, _I64)

        return types.uint64(address), generate

    return typed


def _fold_line(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(_I64, 8)
        words = builder.load(builder.inttoptr(args[0], line.as_pointer()), align=1)
        shift = ir.Constant(line, [WORD_SHIFT] * 8)
        folded = builder.mul(
            builder.xor(words, builder.lshr(words, shift)), ir.Constant(line, list(LINE_FACTORS))
        )
        parts = [builder.extract_element(folded, _word(k)) for k in range(8)]
        while len(parts) > 1:
            parts = [builder.add(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return types.uint64(address), generate


copy_bytes: Any = intrinsic(_copy_bytes)
"""copy_bytes(target, source, count): copies bytes between any addresses."""

load_integer: Any = intrinsic(_load_integer)
"""load_integer(address, index): the int64 there; the address may be any."""

store_integer: Any = intrinsic(_store_integer)
"""store_integer(address, index, value): writes an int64; the address may be any."""

fold_line: Any = intrinsic(_fold_line)
"""fold_line(address): the digest of the 64 bytes at any address.

Each word is folded and multiplied by its own factor of LINE_FACTORS, and the products are added.
"""

load_byte: Any = intrinsic(_load_plain(8))
"""load_byte(address): the byte at the address, as uint64."""

load: Any = intrinsic(prefer_literal=True)(_load)
"""load(address, index, kind, wide, slot): one element as float32, or as float64 if `wide`."""

store: Any = intrinsic(prefer_literal=True)(_store)
"""store(address, index, value, kind, slot): writes one element, rounded to nearest, ties to even."""

through: Any = intrinsic(prefer_literal=True)(_through)
"""through(value, kind): the value that is loaded after `value` was stored as `kind`."""

fma: Any = intrinsic(_fma)
"""fma(a, b, c): a*b + c, rounded once."""

prefetch: Any = intrinsic(_prefetch)
"""prefetch(address): fetches a cache line that will be written."""

copy_lines: Any = intrinsic(prefer_literal=True)(_copy_lines)
"""copy_lines(target, source, count, past_cache): copies lines of 64 bytes. `target` is aligned to 64 bytes."""

take: Any = intrinsic(_take)
"""take(address): reads the int64 at the address and adds one to it, atomically."""


def _claim(plan: Any, worker: int) -> int:
    workers = plan[0]
    for turn in range(workers):
        owner = worker + turn
        if owner >= workers:
            owner -= workers
        place = STRIDE * (owner + 1)
        if plan[place] < plan[place + 1]:
            k = take(plan.ctypes.data + place * 8)
            if k < plan[place + 1]:
                return int(k)
    return -1


claim: Any = register_jitable(_claim)
"""claim(plan, worker): the next slice for this worker; -1 if none is left.

A worker takes the slices of its own stretch first, then those that are left of the others' stretches.
"""


def _tensor_at(starts: Any, number: int) -> int:
    low, high = 0, len(starts) - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if starts[middle] <= number:
            low = middle
        else:
            high = middle
    return low


tensor_at: Any = register_jitable(_tensor_at)
"""tensor_at(starts, number): of tensors that begin at ascending `starts`, with the end of the last behind them, the one at `number`."""


def _folded(lanes: Any) -> float:
    half = len(lanes) >> 1
    while half > 0:
        for j in range(half):
            lanes[j] += lanes[half + j]
        half >>= 1
    return float(lanes[0])


folded: Any = register_jitable(_folded)
"""folded(lanes): the sum of partial sums, as many as a power of two, in an order that is always the same. It overwrites them."""
