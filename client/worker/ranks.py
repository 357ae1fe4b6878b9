"""Checks for ranks of torch.distributed: refuse a DDP wrapper, warn of a policy without rounds.

DistributedDataParallel averages gradients among the ranks before their steps. Each rank would push the average, and the
server would take one step per push: N steps of the same gradient instead of one. The equivalent here is no wrapper and
a round of all ranks: `attach(policy="sync", workers=N)` takes one step of the mean of N gradients.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from pushstep.proto.errors import UnsupportedModule

from ..warn import warn


def world_size() -> int:
    """The number of ranks; 1 without torch.distributed."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return int(torch.distributed.get_world_size())


def is_round_of(policy: str, ranks: int) -> bool:
    """Whether a policy (JSON) makes one step of one push from each of `ranks` workers."""
    held = json.loads(policy or "{}")
    return held.get("policy") == "sync" and held.get("min_workers", 1) >= ranks and held.get("quorum") is None


class Ranks:
    """Makes these checks for the parameters of one attached optimizer; `looked` says that `look` has run."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.looked = self._said = False

    def look(self, policy: str) -> None:
        """Run `refuse_wrapper` and `say` at the first step, when every wrapper has been made."""
        self.refuse_wrapper()
        self.say(policy)
        self.looked = True

    def refuse_wrapper(self) -> None:
        """UnsupportedModule if DistributedDataParallel averages these parameters' gradients."""
        ranks = world_size()
        # _averages searches all objects, which takes 0.1 s of the first step; without ranks it is skipped
        if ranks > 1 and _averages(self._parameters):
            raise UnsupportedModule(
                problem=f"DistributedDataParallel averages these gradients among {ranks} ranks, and the server would take a "
                f"step of the average for each of them. Drop the wrapper, in Lightning strategy='ddp', and have the server "
                f"average: attach(..., policy='sync', workers={ranks}) in every rank gives the same steps"
            )

    def say(self, policy: str, *, chosen: bool = False) -> None:
        """Warn once if the policy does not make one step of all ranks; not if the user has `chosen` it."""
        ranks = world_size()
        if self._said or ranks == 1:
            return
        self._said = True
        if not chosen and not is_round_of(policy, ranks):
            name = json.loads(policy or "{}").get("policy", "async")
            warn(
                f"torch.distributed has {ranks} ranks, and under this model's policy {name!r} each rank's push may be a step "
                f"of its own. What DistributedDataParallel does is attach(..., policy='sync', workers={ranks}), without the "
                "wrapper; policy='async' says that this is meant"
            )


def _averages(parameters: Sequence[Tensor]) -> bool:
    known = {id(parameter) for parameter in parameters}
    kind = torch.nn.parallel.DistributedDataParallel
    return any(
        id(parameter) in known
        for found in gc.get_objects()
        if issubclass(type(found), kind)
        for parameter in found.parameters()
    )
