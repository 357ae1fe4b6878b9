"""How near a run is to its peer and to a float64 run."""

from __future__ import annotations

import numpy as np
import torch


def no_farther(mine, peers, exact, what):
    """Mean and max error against `exact` at most 1.001 times the peer's."""
    my_error, peer_error = (mine.double() - exact).abs(), (peers.double() - exact).abs()
    # Below a thousand elements one element's luck decides; an ulp of the largest is granted there.
    slack = 0.0 if mine.numel() > 1000 else float(np.spacing(np.float32(peers.float().abs().max())))
    assert torch.isfinite(my_error).all(), what
    assert my_error.mean() <= 1.001 * peer_error.mean() + slack, what
    assert my_error.max() <= 1.001 * peer_error.max() + slack, what


def in_step(optimizer, params, peer_params, peer_states):
    """Put our parameters and states where the peer's are."""
    with torch.no_grad():
        for param, value, states in zip(params, peer_params, peer_states, strict=True):
            param.copy_(value)
            for name, held in optimizer.state[param].items():
                held.copy_(states[name])
