"""Two gloo ranks: all-reduce of the gradients, then a local step in each; no server, in step with one another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .driver import Driver, End, end_all
from .peer_local import Rule, optimizer_of, parameter_of
from .side import Side, side_of

RANKS = 2


def _join(rank: int, folder: str) -> End:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    return dist.destroy_process_group


class GlooWorker:
    """One rank."""

    def __init__(self, rule: Rule, elements: int) -> None:
        parameter = parameter_of(elements)
        self._optimizer = optimizer_of(rule, parameter)
        self._gradient = torch.zeros(elements) if parameter.grad is None else parameter.grad

    def exchange(self) -> None:
        """Sum of the gradients over the ranks, then a step. (A mean would cost another pass.)"""
        self._gradient.mul_(1.0 / RANKS)  # so that a sum that is summed again stays as large
        dist.all_reduce(self._gradient)
        self._optimizer.step()

    def close(self) -> None:
        """Nothing to give back."""


def _workers(rule: Rule, elements: int) -> Sequence[GlooWorker]:
    return [GlooWorker(rule, elements)]


class Gloo:
    """Owns the ranks' processes."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._drivers = [Driver(_join, rank, self._folder.name) for rank in range(RANKS)]
        for driver in self._drivers:
            driver.answer()

    def side(self, rule: Rule, elements: int) -> Side:
        """Both ranks."""
        return side_of(f"gloo, {RANKS} ranks", _workers, self._drivers, [(rule, elements)] * RANKS)

    def close(self) -> None:
        """End the processes."""
        end_all(self._drivers)
        self._folder.cleanup()
