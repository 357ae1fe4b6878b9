"""A check of schemathesis': no answer to a role that the table of access does not let in tells anything.

It is loaded by the schemathesis command (`SCHEMATHESIS_HOOKS`), which cannot be told a role in another way than by
ROLE_VARIABLE.
"""

from __future__ import annotations

import os
from typing import Any, Final

import schemathesis

from pushstep.server.access.roles import LET_IN, Need, Role
from pushstep.server.access.table import ROUTES
from tests.support.access.schema_runs import ROLE_VARIABLE

# malformed_request, unauthenticated, permission_denied, busy, too_many_attempts: none depends on what is behind the route
REFUSALS: Final = frozenset({400, 401, 429})
OF_A_ROLE: Final = 403


def is_open(entry: str, role: Role | None) -> bool:
    """Whether the table lets a role in at a route."""
    need = ROUTES[entry]
    return need is Need.OPEN or (role is not None and role in LET_IN[need])


@schemathesis.check
def closed_by_the_table(ctx: Any, response: Any, case: Any) -> None:
    """Refused, by a problem, unless the table lets the role in."""
    name = os.environ[ROLE_VARIABLE]
    role = Role(name) if name else None
    entry = f"{case.method.upper()} {case.operation.path}"
    if entry not in ROUTES or is_open(entry, role):
        return
    expected = REFUSALS if role is None else REFUSALS | {OF_A_ROLE}
    if response.status_code not in expected:
        raise AssertionError(f"{entry} answered {response.status_code} to {name or 'nobody'}")
