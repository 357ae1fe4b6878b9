"""Floods by who has a token, over TLS: health is answered, memory stays within what is said here, and others train on."""

from __future__ import annotations

import contextlib
import os
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from pushstep.client import Outcome, Session
from tests.support.access.secured import Authority, TokenFile
from tests.support.servers.harness import RunningServer, forget_peak, memory_bytes, running_server
from tests.support.source_tree import ROOT
from tests.support.workers import floods
from tests.support.workers.wire import PARAMETERS

STAGING_BYTES = 256 << 20
# Beside what the server is told to keep for pushes and files: all that a flood may take.
CAP_BYTES = STAGING_BYTES + (256 << 20)
GRADIENTS = {name: np.full(value.shape, 1e-3, np.float32) for name, value in PARAMETERS.items()}
# How much of each flood: connections, MiB, requests, streams.
SHORT = {
    "slow-heads": 100,
    "large-body": 300,
    "ranges": 300,
    "idle-streams": 600,
    "idle-connections": 150,
    "resets": 5_000,
}
LONG = {
    "slow-heads": 900,
    "large-body": 1024,
    "ranges": 10_000,
    "idle-streams": 10_000,
    "idle-connections": 2_000,
}
WINDOW_S, WINDOWS = 2.0, 5


class Secured:
    """A server with TLS and tokens, and one that trains at it."""

    def __init__(self, server: RunningServer, authority: Authority, tokens: TokenFile) -> None:
        self.server, self.authority, self.tokens = server, authority, tokens
        self.worker: Session = server.connect(
            floods.MODEL, token=tokens.tokens["worker"], tls=authority.tls()
        )
        self.worker.create(PARAMETERS)
        self.client = httpx.Client(
            verify=ssl.create_default_context(cafile=authority.ca), trust_env=False, timeout=60.0
        )

    def health(self) -> int:
        """The status of /healthz, on a connection that stays."""
        return self.client.get(f"https://{self.server.http}/healthz").status_code

    def pushes_in(self, seconds: float) -> int:
        """Push for a while; how often."""
        until_s, count = time.monotonic() + seconds, 0
        while time.monotonic() < until_s:
            assert self.worker.push(GRADIENTS).outcome is Outcome.APPLIED
            count += 1
        return count

    @contextlib.contextmanager
    def flooded(self, kind: str, count: int) -> Iterator[None]:
        """Under a flood, once all of it is there."""
        server, tokens = self.server, self.tokens.tokens
        command = [sys.executable, "-m", floods.__name__, kind, server.grpc, server.http]
        environment = {**os.environ, "OPERATOR_TOKEN": tokens["operator"], "WORKER_TOKEN": tokens["worker"]}
        process = subprocess.Popen(
            [*command, str(self.authority.ca), str(count)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in place\n"
            yield
            assert process.poll() is None
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("floods")
    authority, tokens = Authority(folder / "authority"), TokenFile(folder / "tokens")
    limits = ("--staging-bytes", str(STAGING_BYTES))
    with running_server(folder / "data", *authority.server_options(), *tokens.options(), *limits) as server:
        made = Secured(server, authority, tokens)
        yield made
        made.client.close()


@pytest.mark.parametrize("kind", SHORT)
def test_a_flood_keeps_nobody_out(secured: Secured, kind: str) -> None:
    pid = secured.server.process.pid
    forget_peak(pid)
    before_bytes = memory_bytes(pid)
    with secured.flooded(kind, SHORT[kind]):
        for _ in range(20):
            assert secured.health() == 200
            assert secured.worker.push(GRADIENTS).outcome is Outcome.APPLIED
    assert memory_bytes(pid, "VmHWM") - before_bytes <= CAP_BYTES


@pytest.mark.soak
@pytest.mark.parametrize("kind", LONG)
def test_a_large_flood_slows_nobody_down(secured: Secured, kind: str) -> None:
    """Pushes under the flood are at least 0.9 of those without: both medians of windows, with and without by turns."""
    pid = secured.server.process.pid
    secured.pushes_in(WINDOW_S)
    forget_peak(pid)
    before_bytes = memory_bytes(pid)
    alone, beside, health_s = [], [], []
    for _ in range(WINDOWS):
        alone.append(secured.pushes_in(WINDOW_S))
        with secured.flooded(kind, LONG[kind]):
            beside.append(secured.pushes_in(WINDOW_S))
            begun_s = time.monotonic()
            assert secured.health() == 200
            health_s.append(time.monotonic() - begun_s)
    grown_bytes = memory_bytes(pid, "VmHWM") - before_bytes
    ratio = statistics.median(beside) / statistics.median(alone)
    print(
        f"{kind}: {ratio:.2f} of the pushes alone, health in {max(health_s):.3f} s, {grown_bytes >> 20} MiB"
    )
    assert grown_bytes <= CAP_BYTES
    assert ratio >= 0.9
