"""Row-sparse gradients, which are (ids, rows) pairs: how duplicate ids are merged, everywhere."""

from __future__ import annotations

from torch import Tensor

from ..backends import reference
from ..step.operands import check_ids
from ..step.step import FUSED_DTYPES


def coalesce(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ascending ids and their rows, duplicates summed in order of appearance.

    ids: int64 of shape (n,); rows: (n, ...). Sums run in float32 for half rows (float64 for double) and are rounded
    once. IndexError for a negative id. To merge again changes nothing, so both ends of the wire may merge.
    """
    check_ids(ids, rows)
    if ids.is_cpu and rows.dtype in FUSED_DTYPES:
        from ..cpu.rows import coalesce as on_cpu  # numba is imported at the first step, not before

        return on_cpu(ids, rows)
    return reference.coalesce(ids, rows)
