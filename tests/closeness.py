"""How near our steps are to a float64 run, against how near the peer's are."""

from __future__ import annotations

import torch


class Distance:
    """Errors of one tensor over the steps of a run, ours beside the peer's."""

    def __init__(self):
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.worst = torch.zeros(2, dtype=torch.float64)
        self.count, self.ulp = 0, 0.0

    def add(self, mine, peers, exact):
        """One step."""
        for k, tensor in enumerate((mine, peers)):
            error = (tensor.double() - exact).abs()
            assert torch.isfinite(error).all()
            self.sums[k] += error.sum()
            self.worst[k] = max(self.worst[k], error.max())
        self.ulp = max(self.ulp, torch.finfo(peers.dtype).eps * exact.abs().max().item())
        self.count += mine.numel()

    def check(self, what):
        """Mean and worst error at most 1.001 times the peer's.

        The worst is one element's luck, so half an ulp of the largest is granted. Over few elements all is luck.
        """
        (mine, peers), (my_worst, peer_worst) = self.sums.tolist(), self.worst.tolist()
        if self.count < 10_000:
            return
        assert mine <= 1.001 * peers, f"{what}: mean error {mine / peers} of the peer's"
        assert my_worst <= 1.001 * peer_worst + self.ulp / 2, f"{what}: {my_worst}, the peer's {peer_worst}"


def in_step(optimizer, params, peer_params, peer_states):
    """Put our parameters and states where the peer's are."""
    with torch.no_grad():
        for param, value, states in zip(params, peer_params, peer_states, strict=True):
            param.copy_(value)
            for name, held in optimizer.state[param].items():
                held.copy_(states[name])


def compare(ours, wide, peer, grads, step):
    """Steps of one optimizer and of its float64 twin (pairs of optimizer and parameters), each from where the peer is.

    Returns the largest distance between our parameters and the peer's in ulps.
    """
    distances, apart = {}, 0.0
    for k, now in enumerate(grads):
        if k:
            in_step(*ours, peer.params, peer.states)
            in_step(*wide, peer.params, peer.states)
        before = [param.detach().clone() for param in ours[1]]
        step(*ours, now)
        step(*wide, now)
        peer.step(now)
        for i, (param, exact, theirs, states) in enumerate(
            zip(ours[1], wide[1], peer.params, peer.states, strict=True)
        ):
            mine, exact_value, theirs = param.detach(), exact.detach(), theirs.detach()
            size = torch.stack([before[i].abs(), theirs.abs(), (theirs - before[i]).abs()]).amax(0)
            distances.setdefault((i, "parameter"), Distance()).add(mine, theirs, exact_value)
            ulp = torch.finfo(theirs.dtype).eps * size
            apart = max(apart, ((mine - theirs).abs() / ulp).max().item())
            for name, value in states.items():
                held, exact_held = ours[0].state[param][name], wide[0].state[exact][name]
                distance = distances.setdefault((i, name), Distance())
                distance.add(held, value.detach(), exact_held)
    for what, distance in distances.items():
        distance.check(what)
    return apart
