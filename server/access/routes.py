"""Lets requests of REST in by the table, before anything of their bodies is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from re import Pattern
from typing import Final
from urllib.parse import parse_qs

from starlette.routing import compile_path
from starlette.types import Scope

from pushstep.proto.errors import (
    PermissionDenied,
    PushstepError,
    TokenRevoked,
    TooManyAttempts,
    Unauthenticated,
)

from .caller import require_all_models, require_model
from .guard import Guard
from .roles import Need
from .table import MODEL_IN, OF_ALL_MODELS, ROUTES

# A route's path as it was written, and its methods.
Routes = Iterable[tuple[str, Collection[str]]]
REALM: Final = "pushstep"


def entry_of(method: str, path: str) -> str:
    """How the table writes a route."""
    return f"{method} {compile_path(path)[1]}"


def need_of(method: str, path: str) -> Need:
    """What a route asks for. RuntimeError for one without an entry."""
    return _need(entry_of(method, path))


def _need(entry: str) -> Need:
    if entry not in ROUTES:
        raise RuntimeError(f"{entry} has no entry in server/access/table.py")
    return ROUTES[entry]


class RouteAccess:
    """What each route asks for, in the order in which they are looked for."""

    def __init__(self, guard: Guard, routes: Routes) -> None:
        """RuntimeError for a route without an entry."""
        self._guard = guard
        self._routes: list[tuple[Pattern[str], dict[str, tuple[Need, str]]]] = []
        for path, methods in routes:
            pattern, written, _ = compile_path(path)
            entries = {method: f"{method} {written}" for method in methods}
            self._routes.append(
                (pattern, {method: (_need(entry), entry) for method, entry in entries.items()})
            )

    def admit(self, scope: Scope) -> None:
        """Let a request in. Unauthenticated, PermissionDenied, TooManyAttempts."""
        if self._guard.is_open:
            return
        need, entry, models = self._asked(scope)
        fields: Sequence[tuple[bytes, bytes]] = scope["headers"]
        authorizations = [value.decode("latin-1") for name, value in fields if name == b"authorization"]
        try:
            self._guard.admit(need, authorizations, f"{scope['method']} {scope['path'][:200]}")
        except PushstepError as error:
            address = scope.get("client") or ("", 0)
            raise self._guard.refusal(error, address[0]) from None
        if entry in OF_ALL_MODELS:
            require_all_models(entry)
        for model in models:
            require_model(model)

    def _asked(self, scope: Scope) -> tuple[Need, str, list[str]]:
        """What a request asks for, its entry, and the models that it names. At no route: a token, whatever it is for."""
        for pattern, methods in self._routes:
            if scope["method"] in methods and (match := pattern.match(scope["path"])):
                need, entry = methods[scope["method"]]
                models = [match["m"]] if "m" in pattern.groupindex else []
                if entry in MODEL_IN:
                    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
                    models += query.get(MODEL_IN[entry], [])
                return need, entry, models
        return Need.MEMBER, "", []


def challenge(error: PushstepError) -> dict[str, str]:
    """The header fields that tell a caller what a refusal asks for (RFC 6750)."""
    match error:
        case TokenRevoked():
            return {"WWW-Authenticate": f'Bearer realm="{REALM}", error="invalid_token"'}
        case Unauthenticated():
            return {"WWW-Authenticate": f'Bearer realm="{REALM}"'}
        case PermissionDenied():
            return {"WWW-Authenticate": f'Bearer realm="{REALM}", error="insufficient_scope"'}
        case TooManyAttempts():
            return {"Connection": "close"}
        case _:
            return {}
