"""How near our steps are to a float64 run, against how near the peer's are."""

from __future__ import annotations

import torch

from tests.support.numbers.ulps import distance, parameter_distance


class Errors:
    """Errors of one tensor over the steps of a run, ours beside the peer's."""

    def __init__(self):
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.worst = torch.zeros(2, dtype=torch.float64)
        self.different, self.ulp = 0, 0.0
        self.steps = []

    def add(self, mine, peers, exact):
        """One step."""
        errors = [(tensor.double() - exact).abs() for tensor in (mine, peers)]
        for k, error in enumerate(errors):
            assert torch.isfinite(error).all()
            self.sums[k] += error.sum()
            if error.numel():
                self.worst[k] = max(self.worst[k], error.max())
        if not self.steps:
            self.different = exact.unique().numel()
        if self.different > 1000:
            self.steps.append(tuple(error.mean().item() for error in errors))
            self.ulp = max(self.ulp, torch.finfo(peers.dtype).eps * exact.abs().max().item())

    def check(self, what, every_step):
        """Mean error, of `every_step` if asked and else of the run, and the worst, at most 1.001 times the peer's.

        Among few different values luck decides: no claim is made for 1,000, nor of a single step for 10,000. The worst
        is one element's luck, so half an ulp of the largest is granted.
        """
        if self.different <= 1000:
            return
        if every_step and self.different > 10_000:
            for k, (mine, peers) in enumerate(self.steps):
                assert mine <= 1.001 * peers, f"{what}, step {k}: mean error {mine}, the peer's {peers}"
        mine, peers = self.sums.tolist()
        assert mine <= 1.001 * peers, f"{what}: mean error {mine / peers} of the peer's"
        my_worst, peer_worst = self.worst.tolist()
        assert my_worst <= 1.001 * peer_worst + self.ulp / 2, f"{what}: {my_worst}, the peer's {peer_worst}"


def in_step(optimizer, params, peer_params, peer_states):
    """Put our parameters and states where the peer's are."""
    with torch.no_grad():
        for param, value, states in zip(params, peer_params, peer_states, strict=True):
            param.copy_(value)
            for name, held in optimizer.state[param].items():
                held.copy_(states[name])


def compare(ours, wide, peer, steps, *, every_step):
    """Steps of one optimizer and of its float64 twin (pairs of optimizer and parameters), each from where the peer is.

    Returns the largest distance between ours and the peer's in ulps, by name; empty unless all are float32.
    """
    errors, apart = {}, {}
    for k, grads in enumerate(steps):
        if k:
            in_step(*ours, peer.params, peer.states)
            in_step(*wide, peer.params, peer.states)
        before = [param.detach().clone() for param in ours[1]]
        for optimizer, params in (ours, wide):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad if grad.dtype == param.dtype else grad.to(param.dtype)
            optimizer.step()
        peer.step(grads)
        for i, (param, exact, theirs, states) in enumerate(
            zip(ours[1], wide[1], peer.params, peer.states, strict=True)
        ):
            mine, theirs = param.detach(), theirs.detach()
            held = {name: value for name, value in ours[0].state[param].items() if name != "step"}
            triples = [("parameter", mine, theirs, exact.detach())]
            triples += [(n, v, states[n].detach(), wide[0].state[exact][n]) for n, v in held.items()]
            for name, one, other, truth in triples:
                errors.setdefault((i, name), Errors()).add(one, other, truth)
                if one.numel() and one.dtype == other.dtype == torch.float32:
                    far = parameter_distance(one, other, before[i]) if one is mine else distance(one, other)
                    apart[name] = max(apart.get(name, 0.0), float(far.max()))
    for what, found in errors.items():
        found.check(what, every_step)
    return apart
