"""The names of an optimizer's parameters, and the modules that cannot be attached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from pushstep.proto.errors import UnsupportedModule

# Names of the children that hold the wrapped module, by the wrapper's class.
_WRAPPED: Final = {
    "OptimizedModule": ("_orig_mod",),
    "DataParallel": ("module",),
    "DistributedDataParallel": ("module",),
    "_FabricModule": ("_forward_module", "_original_module"),
}
# What is removed from a list of names, which has no classes to go by. Users name children `module`, too, so a prefix is
# removed only if every name begins with it.
_COMPILED: Final = "_orig_mod"
_PREFIXES: Final = ("module.", "_forward_module.")
_REFUSED: Final = {
    "DistributedDataParallel": "it averages gradients among its ranks, and the server would average them again: "
    "attach the wrapped module in one rank, or drop the wrapper and let each rank be a worker",
    "FullyShardedDataParallel": "its parameters are shards: attach the unsharded module",
}


def check_module(module: nn.Module) -> None:
    """Raise UnsupportedModule, with the reason, for wrappers whose parameters are not the model's."""
    kinds = {kind for part in (module, *module.modules()) for kind in _class_names(part)}
    for kind, reason in _REFUSED.items():
        if kind in kinds:
            raise UnsupportedModule(problem=f"a {kind} module cannot be attached: {reason}")


def _class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


class CleanNames:
    """Names as the wrapped module has them, without the parts that torch.compile and wrappers add.

    A wrapper is recognised by its class, so a child that a user calls `module` keeps its name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._paths = {"": ""}
        self._add(module, "", "")

    def _add(self, module: nn.Module, path: str, clean: str) -> None:
        wrapped = {name for kind in _class_names(module) for name in _WRAPPED.get(kind, ())}
        # not named_children(), which gives a child under two names once
        for name, child in module._modules.items():
            if child is not None:
                below = clean if name in wrapped else _joined(clean, name)
                self._paths[_joined(path, name)] = below
                self._add(child, _joined(path, name), below)

    def of(self, name: str) -> str:
        """Return the clean name of a parameter, a buffer, or any other key of the module's state_dict."""
        path = name
        while path:
            path, _, _ = path.rpartition(".")
            if path in self._paths:  # other parts of the key come from a state_dict hook
                break
        return _joined(self._paths[path], name[len(path) + 1 :] if path else name)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def clean_list(names: Iterable[str]) -> list[str]:
    """Return names without the parts that torch.compile and wrappers add, if there is no module to look at."""
    found = [".".join(part for part in name.split(".") if part != _COMPILED) for name in names]
    while prefix := next((p for p in _PREFIXES if found and all(n.startswith(p) for n in found)), None):
        found = [name.removeprefix(prefix) for name in found]
    return found


def parameter_names(
    optimizers: Sequence[torch.optim.Optimizer],
    module: nn.Module | None,
    names: Sequence[str] | Mapping[Tensor, str] | None,
) -> tuple[list[str], list[list[str]]]:
    """Return the names of all parameters and the aliases of each, in the order of the optimizers' groups.

    Names come from `module` (matched by identity), else from `names`, else from torch's `param_names`, else they are
    "group.index". Raises UnsupportedModule for names that do not fit the parameters.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if module is not None:
        return _from_module(parameters, module)
    if isinstance(names, Mapping):
        missing = [index for index, parameter in enumerate(parameters) if parameter not in names]
        if missing:
            raise UnsupportedModule(problem=f"names lacks parameter {missing[0]} of {len(parameters)}")
        return _texts(names[parameter] for parameter in parameters), [[] for _ in parameters]
    if names is not None:
        if len(names) != len(parameters):
            raise UnsupportedModule(problem=f"{len(names)} names for {len(parameters)} parameters")
        return _texts(names), [[] for _ in parameters]
    numbered = [[f"{number}.{k}" for k in range(len(group["params"]))] for number, group in enumerate(groups)]
    own = [_param_names(group) for group in groups]
    known = iter(clean_list(name for names_of_group in own for name in names_of_group))
    found = [
        next(known) if own[n] else name
        for n, names_of_group in enumerate(numbered)
        for name in names_of_group
    ]
    return found, [[] for _ in parameters]


def _texts(names: Iterable[Any]) -> list[str]:
    found = list(names)
    wrong = next((name for name in found if not isinstance(name, str)), None)
    if wrong is not None:
        raise UnsupportedModule(problem=f"names are strings, not {type(wrong).__name__}")
    return found


def _param_names(group: Mapping[str, Any]) -> list[str]:
    names = list(group.get("param_names") or ())
    if names and len(names) != len(group["params"]):
        raise UnsupportedModule(
            problem=f"a group has {len(group['params'])} parameters and {len(names)} param_names: pass module= or names="
        )
    return names


def _from_module(parameters: Sequence[Tensor], module: nn.Module) -> tuple[list[str], list[list[str]]]:
    check_module(module)
    clean = CleanNames(module)
    by_identity: dict[int, dict[str, None]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), {})[clean.of(name)] = None
    unknown = [index for index, parameter in enumerate(parameters) if id(parameter) not in by_identity]
    if unknown:
        raise UnsupportedModule(
            problem=f"parameter {unknown[0]} of the optimizer is not one of the module's: pass the module that it was "
            "made from, or names="
        )
    found = [list(by_identity[id(parameter)]) for parameter in parameters]
    return [names[0] for names in found], [names[1:] for names in found]


def added_names(
    group: Mapping[str, Any], index: int, module: nn.Module | None
) -> tuple[list[str], list[list[str]]]:
    """Return the names of an added group's parameters, and the aliases of each.

    Names come from the module, else from the group's `param_names`, else they are "group.index".
    """
    own, parameters = clean_list(_param_names(group)), group["params"]
    names = own or [f"{index}.{n}" for n in range(len(parameters))]
    known: dict[int, list[str]] = {}
    if module is not None:
        clean = CleanNames(module)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            known.setdefault(id(parameter), []).append(clean.of(name))
    found = [known.get(id(p), [name]) for p, name in zip(parameters, names, strict=True)]
    return [names[0] for names in found], [names[1:] for names in found]
