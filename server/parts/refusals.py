"""What is not possible, or not yet, for a model that lies in several ranks; each is refused by name, and nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pushstep.proto.errors import NotInRanks

from ..coordinator.hooks.catalogue import BUILT_IN
from ..coordinator.hooks.clipping import ClipGradNorm, ClipGradValue, GlobalClipnorm
from ..coordinator.hooks.gradients import GradientCentralization
from ..coordinator.hooks.hook import Hook
from .shard import ModelShard

_MODEL: Final = "/v1/models/{m}"
# Routes of REST, as the table of who may do what names them, and what each does.
ROUTES: Final[Mapping[str, str]] = {
    f"POST {_MODEL}/param-groups": "a further param group",
    f"POST {_MODEL}/snapshots/{{snapshot}}/restore": "restoring a snapshot while it is trained",
    f"POST {_MODEL}/restore": "restoring a version while it is trained",
    f"DELETE {_MODEL}/snapshots/{{snapshot}}": "deleting a snapshot",
    f"PUT {_MODEL}/state-dict": "replacing values or state",
}
# Transforms that need the whole gradient of a parameter in one place, or its whole norm.
_NEEDS_ALL: Final = frozenset({"clipnorm", "gradient_noise"})


def refuse(shard: ModelShard | None, model: str, what: str) -> None:
    """NotInRanks if a model lies in several ranks."""
    if shard is not None:
        raise NotInRanks(model=model, ranks=len(shard.parts), what=what)


def refuse_route(shard: ModelShard | None, model: str, route: str) -> None:
    """The same, of a route: a method, and a path as it is declared."""
    if shard is not None and route in ROUTES:
        refuse(shard, model, ROUTES[route])


def refuse_hooks(shard: ModelShard | None, model: str, hooks: Sequence[Hook]) -> None:
    """NotInRanks unless these hooks, in this order, do the same for any number of ranks.

    A clip by the norm over everything does, by the norm that rank 0 has put together, as long as nothing before it has changed
    single elements, which only their own rank has.
    """
    changed_by: Hook | None = None
    for hook in hooks if shard is not None else ():
        if hook.kind == "transform" and (hook.name in _NEEDS_ALL or type(hook) not in BUILT_IN):
            refuse(shard, model, f"the hook {hook.name}")
        if isinstance(hook, ClipGradNorm) and hook.settings.norm_type != 2:
            refuse(shard, model, f"the hook {hook.name} by a norm of type {hook.settings.norm_type}")
        if isinstance(hook, ClipGradNorm | GlobalClipnorm) and changed_by is not None:
            refuse(shard, model, f"the hook {hook.name} behind {changed_by.name}")
        if isinstance(hook, ClipGradValue | GradientCentralization):
            changed_by = hook
