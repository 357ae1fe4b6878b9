"""The policies by name: made from the JSON that operators, workers and snapshots hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pushstep.proto.errors import InvalidSettings

from .async_policy import AsyncPolicy, AsyncSettings
from .bounded import BoundedPolicy, BoundedSettings
from .policy import Policy, PolicySettings
from .read_json import read_json
from .settings import read as read_settings
from .sync_round import SyncPolicy, SyncSettings

Settings = AsyncSettings | BoundedSettings | SyncSettings
_SETTINGS: Final[Mapping[str, type[Settings]]] = {
    "async": AsyncSettings,
    "bounded": BoundedSettings,
    "sync": SyncSettings,
}


def read(settings: Mapping[str, Any], current: PolicySettings | None = None) -> Settings:
    """Validated settings; what is left out stays as in `current` if that is of the same policy, or is the default.

    InvalidSettings if they cannot be.
    """
    name = settings.get("policy", "async" if current is None else current.policy)
    kind = _SETTINGS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InvalidSettings(problem=f"no policy {str(name)[:50]!r}; there are {', '.join(_SETTINGS)}")
    kept = current.model_dump(mode="json") if current is not None and current.policy == name else {}
    return read_settings(kind, {**kept, **settings, "policy": name}, f"policy {name}")


def from_wire(text: str) -> Settings:
    """Settings as a worker sends them at creation: JSON, or nothing. InvalidSettings if they cannot be."""
    found = read_json(text or "{}")
    if not isinstance(found, dict):
        raise InvalidSettings(problem="the policy is not a JSON object")
    return read(found)


def make(settings: Settings) -> Policy:
    """A fresh policy that holds nothing."""
    match settings:
        case AsyncSettings():
            return AsyncPolicy(settings)
        case BoundedSettings():
            return BoundedPolicy(settings)
        case SyncSettings():
            return SyncPolicy(settings)
