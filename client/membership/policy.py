"""The policy that a worker asks for when it creates a model: a name, or a name and settings as in REST."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pushstep.proto.errors import InvalidSettings

Policy = str | Mapping[str, Any]


def for_workers(policy: Policy | None, workers: int | None) -> Policy | None:
    """`policy` with rounds of that many workers, if given. InvalidSettings if it has no such rounds."""
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
    """The policy as JSON; the empty string for None."""
    if policy is None:
        return ""
    return json.dumps({"policy": policy} if isinstance(policy, str) else dict(policy))


def difference(wanted: str, held: str) -> str:
    """The settings in which a model's policy differs from the wanted one, in words; empty if none."""
    asked, found = json.loads(wanted or "{}"), json.loads(held or "{}")
    differing = [name for name, value in asked.items() if found.get(name) != value]
    return ", ".join(f"{name} {found.get(name)!r} and not {asked[name]!r}" for name in differing)


def depends_on_who_is_first(wanted: str, held: str) -> bool:
    """Whether rounds were asked for without a number of workers, so that the first worker steps alone."""
    asked, found = json.loads(wanted or "{}"), json.loads(held or "{}")
    says = asked.get("policy") != "sync" or "min_workers" in asked or asked.get("quorum") is not None
    return not says and found.get("policy") == "sync" and found.get("min_workers", 1) == 1
