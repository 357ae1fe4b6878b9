"""How a catalogue error crosses the wire: as google.rpc.Status over gRPC, as problem+json over HTTP.

Over gRPC the code travels as ErrorInfo.reason with the error's fields beside it, in the trailer from which every gRPC
library reads rich errors; a wait travels as RetryInfo. Over HTTP the body has RFC 9457's shape with `code` and
`fields` added. Both come back as the class that was raised.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from logging import Logger, LoggerAdapter
from typing import Final, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from .. import errors

DOMAIN: Final = "pushstep"
# A message goes into gRPC's trailers three times, and a client is sure to take only 8 KiB of them.
LONGEST_TEXT: Final = 1500
TRAILER: Final = "grpc-status-details-bin"
PROBLEM_TYPE: Final = "application/problem+json"

# What a plain gRPC status means if no catalogue error came with it: gRPC itself has refused the call.
_BARE: Final[dict[grpc.StatusCode, type[errors.PushstepError]]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.MessageTooLarge,
    grpc.StatusCode.UNIMPLEMENTED: errors.MalformedFrame,
}


def named(error: Exception, log: Logger | LoggerAdapter[Logger]) -> errors.PushstepError:
    """A copy of `error` if the catalogue has it, else InternalError, whose traceback is in the log by id.

    Memory may run out anywhere, so MemoryError and torch.OutOfMemoryError become OutOfMemory of an unknown size. A
    Misuse is an InternalError: no server raises one. The traceback of `error` is cut, so that what its frames hold is
    freed.
    """
    if isinstance(error, (errors.OutOfMemory, errors.StorageFailed)):
        # the caller is told, but only the operator can free memory or disk
        log.warning("%s", error.message)
    if isinstance(error, errors.PushstepError) and not isinstance(error, errors.Misuse):
        found: errors.PushstepError = copy.copy(error)
    elif _is_of_memory(error):
        log.error("out of memory", exc_info=error)
        found = errors.OutOfMemory(what="this request", need="an unknown number of")
    else:
        log_id = uuid.uuid4().hex[:12]
        log.error("internal error %s", log_id, exc_info=error)
        found = errors.InternalError(log_id=log_id)
    untrace(error)
    return found


def _is_of_memory(error: Exception) -> bool:
    # imported here: commands read answers by this module, and end before torch would be there
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def untrace(error: BaseException) -> None:
    """Cut the tracebacks of an error, and of the errors that led to it.

    A traceback holds its frames, and these hold what was refused, such as a push's whole body. If a frame also holds
    the error, or a future that does, that is a cycle, which stays in memory until a garbage collection.
    """
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and found.__traceback__ is not None:
            found.__traceback__ = None
            left += (found.__cause__, found.__context__)


def brief(text: str) -> str:
    """A text, which may hold what a caller sent, cut to a length that every door can carry."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} [cut]"


def to_trailer(error: errors.PushstepError) -> bytes:
    """The serialized google.rpc.Status of an error."""
    number = error.grpc_status.value[0]
    status = Status(code=cast(Code, number), message=brief(error.message))
    status.details.add().Pack(ErrorInfo(reason=error.code, domain=DOMAIN, metadata=_brief_fields(error)))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return bytes(status.SerializeToString())


def _brief_fields(error: errors.PushstepError) -> dict[str, str]:
    return {name: brief(value) for name, value in error.fields.items()}


def from_rpc_error(error: grpc.RpcError) -> errors.PushstepError | None:
    """The catalogue error inside a failed call, or None if it failed without one (no server, deadline)."""
    call = cast(grpc.Call, error)
    for key, value in call.trailing_metadata() or ():
        if key == TRAILER and (known := _in_status(cast(bytes, value))) is not None:
            return known
    bare = _BARE.get(call.code())
    return None if bare is None else bare(f"the server's gRPC layer refused: {call.details()}")


def from_status(serialized: bytes) -> errors.PushstepError:
    """The catalogue error in what `to_trailer` wrote; Broken if there is none in it."""
    return _in_status(serialized) or errors.Broken("a refusal that says nothing")


def _in_status(serialized: bytes) -> errors.PushstepError | None:
    status = Status.FromString(serialized)
    for detail in status.details:
        info = ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            kind = errors.CATALOGUE.get(info.reason, errors.Broken)
            return kind(status.message, **dict(info.metadata))
    return None


def to_problem(error: errors.PushstepError) -> dict[str, object]:
    """The application/problem+json body of an error."""
    return {
        "type": f"urn:pushstep:error:{error.code}",
        "title": (type(error).__doc__ or error.code).splitlines()[0],
        "status": error.http_status,
        "detail": brief(error.message),
        "code": error.code,
        "help": error.help,
        "fields": _brief_fields(error),
    }


def from_problem(problem: Mapping[str, object]) -> errors.PushstepError:
    """The catalogue error that a problem+json body stands for; Broken if the catalogue lacks it."""
    kind = errors.CATALOGUE.get(str(problem.get("code")), errors.Broken)
    return kind(str(problem.get("detail", problem)), **cast("dict[str, object]", problem.get("fields", {})))
