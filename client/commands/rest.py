"""Requests to a server's REST interface whose bodies, or answers, are files."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pushstep.proto.errors import PushstepError, ServerUnavailable
from pushstep.proto.errors.status import PROBLEM_TYPE, from_problem

from ..transport.dial import dial
from ..transport.security import Security, is_unix

# How long an answer may take to begin: a server writes a whole checkpoint first.
TIMEOUT_S: Final = 600.0
DIAL_S: Final = 3.0
BLOCK_BYTES: Final = 1 << 20
LONGEST_PROBLEM_BYTES: Final = 1 << 20
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - where a server may say that it listens


def model_path(model: str, *parts: str) -> str:
    """The path of a model's resource."""
    return "/v1/models/" + "/".join(quote(part, safe="") for part in (model, *parts))


@contextmanager
def answer_to(
    server: str,
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    security: Security,
    body: Iterable[bytes] = (),
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, to be read in a block. A body needs its Content-Length in `headers`.

    The error of the catalogue that the server answers with; ServerUnavailable if it cannot be reached.
    """
    transport, found = dial(server, timeout_s=DIAL_S, security=security)
    transport.close()
    connection = _connection(server, found.http_url, security)
    try:
        connection.putrequest(method, f"{path}?{urlencode(query)}" if query else path)
        for name, value in (*headers.items(), *security.headers.items()):
            connection.putheader(name, value)
        connection.endheaders()
        try:
            for block in body:
                connection.send(block)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it was read: the answer says why
        answer = connection.getresponse()
        if answer.status >= 400:
            raise _problem(answer)
        yield answer
    except (OSError, http.client.HTTPException) as error:
        problem = str(error) or type(error).__name__
        raise ServerUnavailable(address=found.http_url, seconds=TIMEOUT_S, problem=problem) from error
    finally:
        connection.close()


def _connection(server: str, http_url: str, security: Security) -> http.client.HTTPConnection:
    """A connection to the REST door of a server that was reached at the address `server`."""
    url = urlsplit(http_url)
    host = url.hostname or ""
    if host in _EVERYWHERE and not is_unix(server):
        # it says where it listens, not under which name it is reached
        host = server.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if url.scheme == "https":
        # a Unix socket speaks no TLS, but REST beside it does
        context = (security if security.is_tls else Security(f"{host}:0", tls=True)).context()
        return http.client.HTTPSConnection(host, url.port, timeout=TIMEOUT_S, context=context)
    security.require_private(f"{host}:{url.port}")
    return http.client.HTTPConnection(host, url.port, timeout=TIMEOUT_S)


def _problem(answer: http.client.HTTPResponse) -> PushstepError:
    text = answer.read(LONGEST_PROBLEM_BYTES)
    if answer.headers.get_content_type() != PROBLEM_TYPE:
        return from_problem({"detail": f"the server answers {answer.status} {answer.reason}"})
    return from_problem(json.loads(text))


def digest_field(sha256: bytes) -> str:
    """A Repr-Digest field of RFC 9530."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


def blocks_of(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """An answer's body in blocks. IncompleteRead if it breaks off."""
    left = answer.length
    while block := answer.read(BLOCK_BYTES):
        left = None if left is None else left - len(block)
        yield block
    if left:
        raise http.client.IncompleteRead(b"", left)


def shown(blocks: Iterable[bytes], what: str, total_bytes: int | None, *, quiet: bool) -> Iterator[bytes]:
    """The same blocks, with their progress on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        for block in blocks:
            yield block
            bar.advance(task, len(block))
