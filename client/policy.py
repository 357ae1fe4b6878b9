"""The policy that a worker asks for when it creates a model: a name, or a name with settings, as REST has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Policy = str | Mapping[str, Any]


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
