"""Row-sparse gradients: (ids, rows) pairs, and the one way in which duplicates are merged."""

from __future__ import annotations

import torch
from torch import Tensor


def coalesce(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ascending ids and their rows, duplicates summed in order of appearance.

    ids: int64 of shape (n,); rows: (n, ...). Merging what is merged already changes nothing, so both ends of
    the wire may do it.
    """
    if ids.numel() < 2 or bool((ids[1:] > ids[:-1]).all()):
        return ids, rows
    merged = torch.sparse_coo_tensor(
        ids.unsqueeze(0),
        rows,
        size=(int(ids.max()) + 1, *rows.shape[1:]),
        is_coalesced=False,
        check_invariants=False,
    ).coalesce()
    return merged.indices()[0], merged.values()
