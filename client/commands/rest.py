"""Requests to a server's REST interface whose bodies, or answers, are files."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pushstep.proto.errors import NotTheCoordinator, PushstepError, ServerUnavailable

from ..transport.security import Security, is_unix
from .access import is_url
from .description import description_of

# How long an answer may take to begin: a server writes a whole checkpoint first.
TIMEOUT_S: Final = 600.0
BLOCK_BYTES: Final = 1 << 20
LONGEST_PROBLEM_BYTES: Final = 1 << 20
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - where a server may say that it listens


def model_path(model: str, *parts: str) -> str:
    """The path of a model's resource."""
    return "/v1/models/" + "/".join(quote(part, safe="") for part in (model, *parts))


class Answer:
    """An answer whose body is read in parts. Each read raises ServerUnavailable if the connection breaks."""

    def __init__(self, response: http.client.HTTPResponse, http_url: str) -> None:
        self._response = response
        self._http_url = http_url
        self.headers = response.headers
        # of the body, as far as it is not read yet; None if the server has not said
        self.length = response.length

    def read(self, size_bytes: int | None = None) -> bytes:
        """So many of the next bytes, fewer only at the end; all by default."""
        with _network(self._http_url):
            return self._response.read(size_bytes)

    def lines(self) -> Iterator[str]:
        """The lines as they come."""
        while True:
            with _network(self._http_url):
                line = self._response.readline()
            if not line:
                return
            yield line.decode().rstrip("\r\n")

    def blocks(self) -> Iterator[bytes]:
        """The body in blocks. ServerUnavailable also if it ends too early."""
        left = self.length
        while block := self.read(BLOCK_BYTES):
            left = None if left is None else left - len(block)
            yield block
        if left:
            with _network(self._http_url):
                raise http.client.IncompleteRead(b"", left)


@contextmanager
def _network(http_url: str) -> Iterator[None]:
    """ServerUnavailable for what a connection raises. No file is read or written in the block: its errors are others."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise ServerUnavailable(address=http_url, seconds=TIMEOUT_S, problem=_reason(error)) from error


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, http.client.RemoteDisconnected):
        return (
            "it ended the connection without an answer; the URL of a REST door with TLS begins with https://"
        )
    if isinstance(error, http.client.BadStatusLine):
        return "it speaks no HTTP; the address for workers is written without http://"
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason or error}; the URL of a REST door without TLS begins with http://"
    return f"its REST door: {error or type(error).__name__}"


@contextmanager
def answer_to(
    server: str,
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    security: Security,
    body: Iterable[bytes] = (),
) -> Iterator[Answer]:
    """The answer to a request, to be read in a block. A body needs its Content-Length in `headers`.

    The error of the catalogue that the server answers with; ServerUnavailable if it cannot be reached; NotTheCoordinator if
    it is a rank above 0.
    """
    http_url = server if is_url(server) else _http_url(server, security)
    connection = _connection(server, http_url, security)
    try:
        with _network(http_url):
            path = urlsplit(http_url).path.rstrip("/") + path
            connection.putrequest(method, f"{path}?{urlencode(query)}" if query else path)
            for name, value in (*headers.items(), *security.headers.items()):
                connection.putheader(name, value)
            connection.endheaders()
        for block in body:
            with _network(http_url):
                try:
                    connection.send(block)
                except (BrokenPipeError, ConnectionResetError):
                    break  # refused before it was read: the answer says why
        with _network(http_url):
            response = connection.getresponse()
        if response.status >= 400:
            raise _problem(response)
        yield Answer(response, http_url)
    finally:
        connection.close()


def _http_url(server: str, security: Security) -> str:
    found = description_of(server, security)
    if not found.http_url:
        raise NotTheCoordinator(rank=found.rank, what="REST")
    return found.http_url


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
    if not is_url(server):  # that one was asked when the token was read
        security.require_private(f"{host}:{url.port}")
    return http.client.HTTPConnection(host, url.port, timeout=TIMEOUT_S)


def _problem(answer: http.client.HTTPResponse) -> PushstepError:
    from pushstep.proto.errors.status import PROBLEM_TYPE, from_problem

    try:
        text = answer.read(LONGEST_PROBLEM_BYTES)
    except (OSError, http.client.HTTPException):
        text = b""
    if answer.headers.get_content_type() != PROBLEM_TYPE:
        return from_problem({"detail": f"the server answers {answer.status} {answer.reason}"})
    return from_problem(json.loads(text))


def digest_field(sha256: bytes) -> str:
    """A Repr-Digest field of RFC 9530."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


def progress_bar(*columns: ProgressColumn, quiet: bool, transient: bool = False) -> Progress:
    """A bar on stderr, if that is a terminal, for a block. `transient`: it goes when the block ends."""
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    return Progress(*columns, console=console, transient=transient, disable=hidden)


def shown(blocks: Iterable[bytes], what: str, total_bytes: int | None, *, quiet: bool) -> Iterator[bytes]:
    """The same blocks, with their progress on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with progress_bar(*columns, TimeRemainingColumn(), quiet=quiet) as bar:
        task = bar.add_task(what, total=total_bytes)
        for block in blocks:
            yield block
            bar.advance(task, len(block))
