"""The kernels for CUDA over rows of a table, by the formulas of `kernels/rows/step.py`, and the sums behind norms.

A program takes a tile of rows. Only named rows are read or written. If ids may repeat, they arrive sorted, with their
positions. At the first position of an id the kernel adds up the id's rows in order of appearance; at the other
positions it does nothing. So nothing is compacted and no count travels to the host. An id outside the table is
skipped, so that memory is safe even where the host could not check the ids.

Sums of squares follow `kernels/norms.py`: in a block of 4096, lane j of 256 adds up elements j, j+256, ... in turn,
then the lanes are folded in halves. A fold adds two numbers at a time, so the compiler chooses no reduction tree.
"""

# ruff: noqa: SIM102, SIM108, RET505
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# Triton's language has no types. It decides an `if` over constants when it compiles, so such an `if` stands alone.
from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from .arithmetic import (
    ADADELTA,
    COUNT,
    FOUND_INF,
    LR_POINTER,
    SCALE_POINTER,
    UNSCALE,
    WRITE_GRAD,
    ZERO_GRAD,
    adadelta,
    count_up,
    divide,
    load,
    pointer_at,
    prepare,
    quotient_root,
    real,
    root,
    store,
)

TILE: Final = 1024
NORM_WARPS: Final = 2
NORM_BLOCK = tl.constexpr(4096)
LANES = tl.constexpr(256)


@triton.jit
def row_gradient(
    rows,
    ids,
    order,
    k,
    row,
    live,
    column,
    mask,
    count,
    WIDTH: tl.constexpr,
    REAL: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The gradient of one tile. Rows of equal id are summed and rounded once to the gradient's dtype."""
    if MERGED:
        return load(rows, k[:, None] * WIDTH + column[None, :], mask, REAL)
    else:
        place = tl.load(order + k, mask=live, other=0)
        g = load(rows, place[:, None] * WIDTH + column[None, :], mask, REAL)
        following = k + 1
        more = live & (following < count)
        more = more & (tl.load(ids + following, mask=more, other=-1) == row)
        while tl.max(more.to(tl.int32), axis=0) > 0:
            place = tl.load(order + following, mask=more, other=0)
            here = mask & more[:, None]
            x = load(rows, place[:, None] * WIDTH + column[None, :], here, REAL)
            g = tl.where(here, g + x, g)
            following = following + 1
            more = more & (following < count)
            more = more & (tl.load(ids + following, mask=more, other=-1) == row)
        if rows.dtype.element_ty.primitive_bitwidth == 16:
            g = g.to(tl.float32).to(rows.dtype.element_ty).to(tl.float32).to(REAL)
        return g


@triton.jit(do_not_specialize=["count", "table_rows"])
def step_rows(
    param,
    rows,
    ids,
    order,
    first,
    second,
    counter,
    lr_pointer,
    grad_scale_pointer,
    found_inf,
    count: tl.int64,
    table_rows: tl.int64,
    lr: tl.float64,
    factor: tl.float64,
    grad_scale: tl.float64,
    rho: tl.float64,
    one_minus_rho: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROW_WISE: tl.constexpr,
    EVERY_ROW: tl.constexpr,
    MERGED: tl.constexpr,
    REAL: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Step `count` rows of a (table_rows, WIDTH) table.

    EVERY_ROW: row k of the gradient steps row k of the table.
    """
    if FOUND_INF & FLAGS:
        if tl.load(found_inf) == 1.0:
            return
    if COUNT & FLAGS:
        if tl.program_id(0) + tl.program_id(1) == 0:
            count_up(counter)
    if LR_POINTER & FLAGS:
        minus_lr = (-tl.load(lr_pointer).to(tl.float64)).to(REAL)
    else:
        minus_lr = (-real(lr, tl.float64)).to(REAL)
    if SCALE_POINTER & FLAGS:
        scale = tl.load(grad_scale_pointer).to(REAL)
    else:
        scale = real(grad_scale, REAL)
    rho_, rest, eps_ = real(rho, REAL), real(one_minus_rho, REAL), real(eps, REAL)
    decay, factor_ = real(weight_decay, REAL), real(factor, REAL)

    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = k < count
    if EVERY_ROW:
        row = k
    else:
        row = tl.load(ids + k, mask=live, other=-1)
        live = live & (row >= 0) & (row < table_rows)
        if not MERGED:
            before = tl.load(ids + k - 1, mask=live & (k > 0), other=-1)
            live = live & (row != before)

    if ROW_WISE:
        total = tl.zeros([ROWS], tl.float64)
        for start in range(0, WIDTH, COLS):
            column = start + tl.arange(0, COLS)
            mask = live[:, None] & (column < WIDTH)[None, :]
            g = row_gradient(rows, ids, order, k, row, live, column, mask, count, WIDTH, REAL, MERGED)
            if UNSCALE & FLAGS:
                g = divide(g, scale)
            p = load(param, row[:, None] * WIDTH + column[None, :], mask, REAL)
            g = prepare(g, p, factor_, factor_, decay, FLAGS).to(tl.float64)
            total += tl.sum(tl.where(mask, g * g, 0.0), axis=1)
        mean = (total / WIDTH).to(REAL)
        if ADADELTA & FLAGS:
            v = tl.fma(rest, mean, rho_ * load(first, row, live, REAL))
            u = load(second, row, live, REAL)
            ratio = quotient_root(u, v, eps_)
            store(first, row, v, live)
        else:
            h = load(first, row, live, REAL) + mean
            store(first, row, h, live)
            ratio = divide(minus_lr, root(h) + eps_)
        moved = tl.zeros([ROWS], tl.float64)
        for start in range(0, WIDTH, COLS):
            column = start + tl.arange(0, COLS)
            mask = live[:, None] & (column < WIDTH)[None, :]
            g = row_gradient(rows, ids, order, k, row, live, column, mask, count, WIDTH, REAL, MERGED)
            if UNSCALE & FLAGS:
                g = divide(g, scale)
                if WRITE_GRAD & FLAGS:
                    store(rows, k[:, None] * WIDTH + column[None, :], g, mask)
            at = row[:, None] * WIDTH + column[None, :]
            p = load(param, at, mask, REAL)
            g = prepare(g, p, factor_, factor_, decay, FLAGS)
            if ADADELTA & FLAGS:
                d = ratio[:, None] * g
                wide = d.to(tl.float64)
                moved += tl.sum(tl.where(mask, wide * wide, 0.0), axis=1)
                p = tl.fma(minus_lr, d, p)
            else:
                p = tl.fma(ratio[:, None], g, p)
            store(param, at, p, mask)
            if ZERO_GRAD & FLAGS:
                store(rows, k[:, None] * WIDTH + column[None, :], tl.zeros_like(g), mask)
        if ADADELTA & FLAGS:
            store(second, row, tl.fma(rest, (moved / WIDTH).to(REAL), rho_ * u), live)
    else:
        column = tl.program_id(1) * COLS + tl.arange(0, COLS)
        mask = live[:, None] & (column < WIDTH)[None, :]
        g = row_gradient(rows, ids, order, k, row, live, column, mask, count, WIDTH, REAL, MERGED)
        if UNSCALE & FLAGS:
            g = divide(g, scale)
        at = row[:, None] * WIDTH + column[None, :]
        p = load(param, at, mask, REAL)
        g = prepare(g, p, factor_, factor_, decay, FLAGS)
        if ADADELTA & FLAGS:
            v = load(first, at, mask, REAL)
            u = load(second, at, mask, REAL)
            v, d, u = adadelta(g, v, u, rho_, rest, eps_, FLAGS)
            store(first, at, v, mask)
            store(second, at, u, mask)
            p = tl.fma(minus_lr, d, p)
        else:
            h = load(first, at, mask, REAL) + g * g
            store(first, at, h, mask)
            p = p + minus_lr * divide(g, root(h) + eps_)
        store(param, at, p, mask)


@triton.jit
def fold(x, SIZE: tl.constexpr):
    """Add the upper half to the lower."""
    return tl.sum(tl.reshape(x, [2, SIZE // 2]), axis=0)


@triton.jit
def square_blocks(pointers, extents, blocks, sums, G: tl.constexpr, FLAGS: tl.constexpr):
    """Write the float64 sum of squares of each block of the tensors. pointers: one address per tensor."""
    program = tl.program_id(0)
    tensor = tl.load(blocks + program).to(tl.int64)
    size = tl.load(extents + 2 * tensor)
    start = (program - tl.load(extents + 2 * tensor + 1)) * NORM_BLOCK
    values = pointer_at(pointers + tensor, 0, G, FLAGS)
    lanes = tl.zeros([LANES], tl.float64)
    if start + NORM_BLOCK <= size:
        for chunk in tl.static_range(0, NORM_BLOCK, LANES):
            x = load(values, start + chunk + tl.arange(0, LANES), None, tl.float64)
            lanes += x * x
    else:
        for chunk in tl.static_range(0, NORM_BLOCK, LANES):
            offsets = start + chunk + tl.arange(0, LANES)
            x = load(values, offsets, offsets < size, tl.float64)
            lanes += x * x
    lanes = fold(fold(fold(fold(lanes, 256), 128), 64), 32)
    tl.store(sums + program, tl.sum(fold(fold(fold(lanes, 16), 8), 4), axis=0))
