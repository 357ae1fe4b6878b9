"""Checks each call of gRPC against the table of who may do what, before anything of it is read.

A call without a valid token uses one attempt of its caller's address. When none is left, the connection is closed, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool

from pushstep.proto.errors import PushstepError, TooManyAttempts
from pushstep.proto.errors.status import TRAILER, brief, to_trailer

from ..access.guard import Guard
from ..access.table import RPCS
from ..counters.server_counts import WORKERS_DOOR, ServerCounts
from ..streams.connections import place_of
from ..streams.readers import Context
from .methods import abort
from .throttle import LEAVE_S, disconnect

log = logging.getLogger("pushstep.grpc")
FIELD: Final = "authorization"


def require_entries(services: Iterable[str]) -> None:
    """RuntimeError if a method of one of these services has no entry in the table."""
    pool = descriptor_pool.Default()
    for service in services:
        for method in pool.FindServiceByName(service).methods:
            if f"/{service}/{method.name}" not in RPCS:
                raise RuntimeError(f"/{service}/{method.name} has no entry in server/access/table.py")


class Entrance(grpc.aio.ServerInterceptor):
    """Asks the guard about each call. gRPC answers UNIMPLEMENTED for a method without an entry."""

    def __init__(self, guard: Guard, counts: ServerCounts) -> None:
        self._guard = guard
        self._counts = counts

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, or one that refuses."""
        method = handler_call_details.method
        need = RPCS.get(method)
        if need is None:
            return None
        authorizations = [
            value if isinstance(value, str) else value.decode("latin-1")
            for key, value in handler_call_details.invocation_metadata
            if key == FIELD
        ]
        try:
            self._guard.admit(need, authorizations, method)
        except PushstepError as error:
            return self._refusing(error)
        return await continuation(handler_call_details)

    def _refusing(self, error: PushstepError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(_: Any, context: Context) -> None:
            peer = context.peer()
            place = place_of(peer)
            refusal = error if place is None else self._guard.refusal(error, str(place[0]))
            log.debug("refused: %s", refusal.message)
            self._counts.refused(WORKERS_DOOR, refusal.code)
            if isinstance(refusal, TooManyAttempts):
                asyncio.get_running_loop().call_later(LEAVE_S, disconnect, peer)
            await abort(
                context, refusal.grpc_status, brief(refusal.message), ((TRAILER, to_trailer(refusal)),)
            )

        return grpc.stream_stream_rpc_method_handler(refuse)
