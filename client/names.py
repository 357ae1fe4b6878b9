"""What the parameters of an optimizer are called, and which modules cannot be handed to a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.proto.errors import UnsupportedModule

_WRAPPERS = ("module.", "_orig_mod.")
_REFUSED = {
    "DistributedDataParallel": "it averages gradients among its ranks, and the server would average them again: "
    "attach the wrapped module in one rank, or drop the wrapper and let each rank be a worker",
    "FullyShardedDataParallel": "its parameters are shards: attach the unsharded module",
}


def check_module(module: nn.Module) -> None:
    """UnsupportedModule, with the reason, for wrappers whose parameters are not the model's."""
    kinds = {type(part).__name__ for part in module.modules()} | {type(module).__name__}
    for kind, reason in _REFUSED.items():
        if kind in kinds or kind in {base.__name__ for base in type(module).__mro__}:
            raise UnsupportedModule(problem=f"a {kind} module cannot be attached: {reason}")


def check_parameter(parameter: Tensor, name: str) -> None:
    """UnsupportedModule for distributed tensors."""
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "placements"):
        raise UnsupportedModule(
            problem=f"parameter {name!r} is a DTensor, a shard of a tensor: attach the whole one"
        )


def clean(name: str) -> str:
    """A module's name for a parameter without what torch.compile and wrappers put before it."""
    parts = name
    stripped = True
    while stripped:
        stripped = False
        for wrapper in _WRAPPERS:
            if parts.startswith(wrapper):
                parts, stripped = parts[len(wrapper) :], True
    return parts.replace("._orig_mod.", ".")


def parameter_names(
    optimizers: Sequence[torch.optim.Optimizer],
    module: nn.Module | None,
    names: Sequence[str] | Mapping[Tensor, str] | None,
) -> tuple[list[str], list[list[str]]]:
    """Each parameter's name and its aliases, in the order of the optimizers' groups.

    From `module` (matched by identity), else `names`, else torch's `param_names`, else "group.index".
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if module is not None:
        return _from_module(parameters, module)
    if isinstance(names, Mapping):
        missing = [index for index, parameter in enumerate(parameters) if parameter not in names]
        if missing:
            raise UnsupportedModule(problem=f"names lacks parameter {missing[0]} of {len(parameters)}")
        return [names[parameter] for parameter in parameters], [[] for _ in parameters]
    if names is not None:
        if len(names) != len(parameters):
            raise UnsupportedModule(problem=f"{len(names)} names for {len(parameters)} parameters")
        return list(names), [[] for _ in parameters]
    found: list[str] = []
    for number, group in enumerate(groups):
        own = group.get("param_names") or [f"{number}.{index}" for index in range(len(group["params"]))]
        found.extend(clean(name) for name in own)
    return found, [[] for _ in parameters]


def _from_module(parameters: Sequence[Tensor], module: nn.Module) -> tuple[list[str], list[list[str]]]:
    check_module(module)
    by_identity: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(clean(name))
    unknown = [index for index, parameter in enumerate(parameters) if id(parameter) not in by_identity]
    if unknown:
        raise UnsupportedModule(
            problem=f"parameter {unknown[0]} of the optimizer is not one of the module's: pass the module that it was "
            "made from, or names="
        )
    found = [by_identity[id(parameter)] for parameter in parameters]
    return [names[0] for names in found], [names[1:] for names in found]


def added_names(group: Mapping[str, Any], index: int, module: nn.Module | None) -> list[str]:
    """What the parameters of an added group are called: by the module, else the group's own names, else numbers."""
    own, parameters = group.get("param_names"), group["params"]
    names = [clean(n) for n in own] if own else [f"{index}.{n}" for n in range(len(parameters))]
    known = {} if module is None else {id(p): clean(name) for name, p in module.named_parameters()}
    return [known.get(id(p), name) for p, name in zip(parameters, names, strict=True)]
