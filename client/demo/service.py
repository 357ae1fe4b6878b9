"""The demo's server: `pushstep-server` on free local ports, in one process or in several ranks, and the demo's REST calls."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors.numpy import save_file

from .. import connect
from .errors import DemoFailed
from .processes import Child, Processes

# The first start on a machine compiles the kernels.
READY_WITHIN_S: Final = 300.0
ANSWER_WITHIN_S: Final = 30.0
_READY: Final = re.compile(r"ready (?:rank=\d+ )?grpc=(?P<grpc>\S+)(?: http=(?P<http>\S+))?(?: unix=.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A running server and where it listens."""

    child: Child
    """The server, or rank 0."""
    others: tuple[Child, ...] = ()
    """The other ranks."""
    grpc: str
    """host:port for workers."""
    http: str
    """host:port for operators."""

    def stop(self) -> None:
        """End it in order. Rank 0 ends the other ranks."""
        self.child.stop()
        for other in self.others:
            other.expect_end()

    def fetch_checkpoint(self, model: str, path: Path) -> None:
        """Save the model's newest version as a safetensors file."""
        if not self.others:
            path.write_bytes(self._ask("GET", f"models/{model}/export?format=safetensors"))
            return
        # an export is one rank's: a reader puts the parts together
        with connect(self.grpc, model=model, worker="checkpoint", shared_memory=False) as session:
            save_file(session.pull(), path)

    def change_policy(self, model: str, settings: Mapping[str, Any]) -> None:
        """Change settings of the model's policy; settings that are left out stay."""
        self._ask("PATCH", f"models/{model}/policy", json.dumps(settings).encode())

    def _ask(self, method: str, resource: str, body: bytes | None = None) -> bytes:
        url = f"http://{self.http}/v1/{resource}"
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers, method=method)
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({})
        )  # a proxy cannot reach this loopback address
        try:
            with direct.open(request, timeout=ANSWER_WITHIN_S) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as refused:
            with refused:
                said = refused.read().decode(errors="replace")
            raise DemoFailed(f"{method} {url} answered {refused.code}: {said}") from None
        except (OSError, http.client.HTTPException) as broken:
            raise self.child.failure(f"did not answer ({method} {url}: {broken})") from broken


def start_service(processes: Processes, data: Path, shards: int = 1) -> Service:
    """Start the server on an empty data folder and wait for its addresses. DemoFailed, ProcessFailed.

    With several `shards` each is a rank of one job, as under torchrun, and holds its part of each model.
    """
    program = Path(sys.executable).with_name("pushstep-server")
    if not program.exists():
        raise DemoFailed(f"there is no {program}: install pushstep into this environment")
    command = [str(program), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)]
    if shards == 1:
        children = [processes.start("server", command)]
    else:
        port = _free_port()
        children = [
            processes.start(f"server-{rank}", command, _of_rank(rank, shards, port)) for rank in range(shards)
        ]
    ready = _wait_until_ready(processes, children)
    return Service(child=children[0], others=tuple(children[1:]), grpc=ready["grpc"], http=ready["http"])


def _of_rank(rank: int, shards: int, port: int) -> dict[str, str]:
    """What torchrun says to each process that it starts."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(shards),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    """A port that nobody has just now, where the ranks meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_until_ready(processes: Processes, children: Sequence[Child]) -> re.Match[str]:
    """Wait for the first line of each; that of the first child, which says where it listens."""
    said: dict[Child, re.Match[str]] = {}
    until = time.monotonic() + READY_WITHIN_S
    while len(said) < len(children) and (left := until - time.monotonic()) > 0:
        heard = processes.next_line(left)
        if heard is None:
            break
        child, text = heard
        if text is None:
            raise child.failure("ended before it was ready")
        ready = _READY.fullmatch(text.strip())
        if ready is None:
            raise child.failure(f"said {text!r} instead of where it listens")
        said[child] = ready
    if len(said) < len(children):
        late = next(child for child in children if child not in said)
        raise late.failure(f"was not ready within {READY_WITHIN_S:.0f} s")
    return said[children[0]]
