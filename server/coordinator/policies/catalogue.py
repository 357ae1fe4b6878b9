"""The policies by name, made from the JSON settings of operators, workers and snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from pushstep.proto.errors import InvalidSettings

from ..settings import read as read_settings
from ..settings import read_json
from .asynchronous import AsyncPolicy, AsyncSettings
from .bounded import BoundedPolicy, BoundedSettings
from .policy import Policy, PolicySettings
from .synchronous import SyncPolicy, SyncSettings

# Each kind of settings, and the policy that is made with it.
POLICIES: Final[Mapping[type[PolicySettings], Callable[[Any], Policy]]] = {
    AsyncSettings: AsyncPolicy,
    BoundedSettings: BoundedPolicy,
    SyncSettings: SyncPolicy,
}
_BY_NAME: Final = {kind.model_fields["policy"].default: kind for kind in POLICIES}


def read(settings: Mapping[str, Any], current: PolicySettings | None = None) -> PolicySettings:
    """Validate settings. A field that is left out keeps its value in `current` if that is of the same policy.

    Otherwise it takes its default. InvalidSettings if the result is not valid.
    """
    name = settings.get("policy", "async" if current is None else current.policy)
    kind = _BY_NAME.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InvalidSettings(problem=f"no policy {str(name)[:50]!r}; there are {', '.join(_BY_NAME)}")
    kept = current.model_dump(mode="json") if current is not None and current.policy == name else {}
    return read_settings(kind, {**kept, **settings, "policy": name}, f"policy {name}")


def from_wire(text: str) -> PolicySettings:
    """Settings as a worker sends them at creation: JSON, or nothing. InvalidSettings or InvalidText."""
    found = read_json(text or "{}")
    if not isinstance(found, dict):
        raise InvalidSettings(problem="the policy is not a JSON object")
    return read(found)


def make(settings: PolicySettings) -> Policy:
    """Make a policy that holds no push yet."""
    return POLICIES[type(settings)](settings)
