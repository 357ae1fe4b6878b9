"""Row-sparse gradients: (ids, rows) pairs, and the one way in which duplicates are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import check_ids
from .step import FUSED_DTYPES


def coalesce(ids: Tensor, rows: Tensor, *, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Unique ascending ids and their rows, duplicates summed in order of appearance.

    ids: int64 of shape (n,); rows: (n, ...). Sums run in float32 for half rows (float64 for double) and are rounded
    once. IndexError for a negative id. Merging what is merged already changes nothing, so both ends of the wire may do it.
    """
    check_ids(ids, rows)
    if ids.is_cpu and rows.dtype in FUSED_DTYPES:
        from .cpu_rows import coalesce as on_cpu

        return on_cpu(ids, rows, threads=threads)
    if ids.numel() < 2 or bool((ids[1:] > ids[:-1]).all()):
        return ids, rows
    order = torch.sort(ids, stable=True).indices
    arranged = ids[order]
    first = torch.ones_like(arranged, dtype=torch.bool)
    first[1:] = arranged[1:] != arranged[:-1]
    starts = first.nonzero().reshape(-1)
    ends = torch.cat([starts[1:], torch.full_like(starts[:1], ids.numel())])
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    merged = rows[order[starts]].to(wide)
    # The k-th duplicates of all ids at once: as many passes as the commonest id has rows.
    following = starts + 1
    left = (following < ends).nonzero().reshape(-1)
    while left.numel():
        merged[left] += rows[order[following[left]]].to(wide)
        following += 1
        left = left[following[left] < ends[left]]
    return arranged[starts], merged.to(rows.dtype)
