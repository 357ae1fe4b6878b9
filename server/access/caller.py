"""Who calls: the holder of a token, for the length of a request.

A door sets CALLER in the context of the request, in which everything that the request does runs. It is None where the
doors are open, and in the server's own work.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextvars import ContextVar
from fnmatch import translate
from typing import Any, Final

from pushstep.proto.errors import PermissionDenied, TokenRevoked

from .roles import LET_IN, Need, Role


class Caller:
    """The holder of one token. It knows the calls that it has under way, and ends them when the token is revoked.

    Nothing here is secret. Used on the event loop only.
    """

    __slots__ = ("_calls", "_of_models", "_of_workers", "is_revoked", "models", "name", "role", "workers")

    def __init__(
        self, name: str, role: Role, models: Sequence[str] = (), workers: Sequence[str] = ()
    ) -> None:
        """Patterns of the names of the only models that it may use, and of the only workers that it may be; empty for all."""
        self.name = name
        self.role = role
        self.models = tuple(models)
        self.workers = tuple(workers)
        self.is_revoked = False
        self._of_models = [re.compile(translate(pattern)) for pattern in models]
        self._of_workers = [re.compile(translate(pattern)) for pattern in workers]
        self._calls: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"Caller({self.name!r}, {self.role.value!r}, {self.models!r})"

    @property
    def actor(self) -> str:
        """As events name it."""
        return f"{self.role.value}:{self.name}"

    def may_use(self, model: str) -> bool:
        """Whether the token is for this model."""
        return not self._of_models or any(pattern.match(model) for pattern in self._of_models)

    def may_be(self, worker: str) -> bool:
        """Whether the token is for a worker of this name."""
        return not self._of_workers or any(pattern.match(worker) for pattern in self._of_workers)

    def require(self, need: Need, what: str) -> None:
        """PermissionDenied unless this role is let in. TokenRevoked."""
        if self.role not in LET_IN[need]:
            raise PermissionDenied(
                problem=f"{what} is for a token of role {need.value}, and {self.name!r} is a {self.role.value}",
                need=need.value,
            )
        if self.is_revoked:
            raise TokenRevoked(name=self.name)

    def begins(self) -> None:
        """Count the current task as one of the caller's until it ends."""
        task = asyncio.current_task()
        if task is not None:
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    def revoke(self) -> int:
        """End all that the caller has under way; how many calls that are. Whoever runs a call answers TokenRevoked."""
        self.is_revoked = True
        for task in tuple(self._calls):
            task.cancel()
        return len(self._calls)


CALLER: Final[ContextVar[Caller | None]] = ContextVar("caller", default=None)


def may_use(model: str) -> bool:
    """Whether this request's caller may use a model of this name."""
    caller = CALLER.get()
    return caller is None or caller.may_use(model)


def require_model(model: str) -> None:
    """PermissionDenied unless this request's caller may use a model of this name, whether or not there is one."""
    caller = CALLER.get()
    if caller is not None and not caller.may_use(model):
        raise PermissionDenied(
            problem=f"the token {caller.name!r} is for models {', '.join(caller.models)}, and {model[:200]!r} is none of them",
            need=f"models {', '.join(caller.models)}",
        )


def require_named(message: Any) -> None:
    """PermissionDenied if a worker's message names a model, or a worker, that its caller's token is not for.

    A message without a worker's name reads, or has the ticket of a join, which was looked at.
    """
    require_model(message.model)
    caller = CALLER.get()
    if caller is None or not caller.workers:
        return
    fields = message.DESCRIPTOR.fields_by_name
    named = message.worker if "worker" in fields else message.identity.worker if "identity" in fields else ""
    if named and not caller.may_be(named):
        raise PermissionDenied(
            problem=f"the token {caller.name!r} is for workers {', '.join(caller.workers)}, and {named[:200]!r} is none of them",
            need=f"worker {', '.join(caller.workers)}",
        )


def require_all_models(what: str) -> None:
    """PermissionDenied if this request's caller may use some models only."""
    caller = CALLER.get()
    if caller is not None and caller.models:
        raise PermissionDenied(
            problem=f"{what} tells of all models, and the token {caller.name!r} is for {', '.join(caller.models)}",
            need="a token for all models",
        )


def was_cut() -> TokenRevoked | None:
    """What to answer to a request that was cancelled because its token was revoked; None for any other end."""
    caller, task = CALLER.get(), asyncio.current_task()
    if caller is None or not caller.is_revoked or task is None:
        return None
    task.uncancel()
    return TokenRevoked(name=caller.name)
