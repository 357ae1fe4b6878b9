"""The roles that a token may have, and what a route, an RPC or a message of the local socket asks for."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """What the holder of a token is. A worker trains and steers nothing; an operator does all that a viewer does."""

    WORKER = "worker"
    VIEWER = "viewer"
    OPERATOR = "operator"


class Need(StrEnum):
    """Who is let in."""

    OPEN = "open"  # everyone, without a token
    MEMBER = "any"  # every known token
    WORKER = "worker"
    VIEWER = "viewer"
    OPERATOR = "operator"


LET_IN: Final[Mapping[Need, frozenset[Role]]] = {
    Need.OPEN: frozenset(Role),
    Need.MEMBER: frozenset(Role),
    Need.WORKER: frozenset({Role.WORKER}),
    Need.VIEWER: frozenset({Role.VIEWER, Role.OPERATOR}),
    Need.OPERATOR: frozenset({Role.OPERATOR}),
}
