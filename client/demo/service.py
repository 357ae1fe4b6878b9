"""The demo's server: a `pushstep-server` process on free local ports, and the demo's REST calls."""

from __future__ import annotations

import http.client
import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import DemoFailed
from .processes import Child, Processes

# The first start on a machine compiles the kernels.
READY_WITHIN_S: Final = 300.0
ANSWER_WITHIN_S: Final = 30.0
_READY: Final = re.compile(r"ready grpc=(?P<grpc>\S+) http=(?P<http>\S+)(?: unix=.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A running server and where it listens."""

    child: Child
    grpc: str
    """host:port for workers."""
    http: str
    """host:port for operators."""

    def fetch_checkpoint(self, model: str, path: Path) -> None:
        """Save the model's newest version as a safetensors file."""
        path.write_bytes(self._ask("GET", f"models/{model}/export?format=safetensors"))

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


def start_service(processes: Processes, data: Path) -> Service:
    """Start the server on an empty data folder and wait for its addresses. DemoFailed, ProcessFailed."""
    program = Path(sys.executable).with_name("pushstep-server")
    if not program.exists():
        raise DemoFailed(f"there is no {program}: install pushstep into this environment")
    command = [str(program), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)]
    child = processes.start("server", command)
    until = time.monotonic() + READY_WITHIN_S
    while (left := until - time.monotonic()) > 0:
        heard = processes.next_line(left)
        if heard is None:
            break
        _, text = heard
        if text is None:
            raise child.failure("ended before it was ready")
        if ready := _READY.fullmatch(text.strip()):
            return Service(child=child, grpc=ready["grpc"], http=ready["http"])
        raise child.failure(f"said {text!r} instead of where it listens")
    raise child.failure(f"was not ready within {READY_WITHIN_S:.0f} s")
