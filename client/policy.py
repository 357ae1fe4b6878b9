"""The policy that a worker asks for when it creates a model: a name, or a name with settings, as REST has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pushstep.proto.errors import InvalidSettings

Policy = str | Mapping[str, Any]


def for_workers(policy: Policy | None, workers: int | None) -> Policy | None:
    """The policy of a model that so many workers step together. InvalidSettings for one under which they do not."""
    if workers is None:
        return policy
    settings: dict[str, Any] = {"policy": policy} if isinstance(policy, str) else dict(policy or {})
    if settings.get("policy") != "sync":
        raise InvalidSettings(
            problem=f"workers={workers!r} goes with policy='sync', whose rounds wait for them"
        )
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InvalidSettings(problem=f"workers={workers!r}: use how many there are, 1 or more")
    if settings.setdefault("min_workers", workers) != workers:
        raise InvalidSettings(
            problem=f"workers={workers} and min_workers={settings['min_workers']} are two answers"
        )
    return settings


def to_wire(policy: Policy | None) -> str:
    """The policy as JSON; empty when none was asked for."""
    if policy is None:
        return ""
    return json.dumps({"policy": policy} if isinstance(policy, str) else dict(policy))


def difference(wanted: str, held: str) -> str:
    """What a model's policy has other than was asked for, in words; empty if nothing."""
    asked, found = json.loads(wanted or "{}"), json.loads(held or "{}")
    differing = [name for name, value in asked.items() if found.get(name) != value]
    return ", ".join(f"{name} {found.get(name)!r} and not {asked[name]!r}" for name in differing)


def depends_on_who_is_first(wanted: str, held: str) -> bool:
    """Whether rounds were asked for and not of how many, so that who comes first steps alone."""
    asked, found = json.loads(wanted or "{}"), json.loads(held or "{}")
    says = asked.get("policy") != "sync" or "min_workers" in asked or asked.get("quorum") is not None
    return not says and found.get("policy") == "sync" and found.get("min_workers", 1) == 1
