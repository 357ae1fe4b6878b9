"""The log: whoever does not read it holds up nobody, and what was dropped is said."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from pushstep.server.process import logs
from pushstep.server.process.logs import LogWriter
from tests.support.servers.harness import COMMANDS, DEVICE


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def logger(writer: LogWriter) -> logging.Logger:
    made = logging.Logger("test")
    made.addHandler(writer)
    return made


def test_lines_come_in_order(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    log = logger(writer)
    threads = [
        threading.Thread(target=lambda k=k: [log.info("%d %d", k, n) for n in range(200)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    with os.fdopen(pipe[0]) as reader:
        lines = [reader.readline().split() for _ in range(800)]
    for thread in threads:
        thread.join()
    for k in range(4):
        assert [int(n) for thread, n in lines if int(thread) == k] == list(range(200))
    os.close(pipe[1])


def test_nobody_waits_for_a_reader(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_BYTES", 1 << 16)
    monkeypatch.setattr(logs, "LAST_S", 0.01)
    writer = LogWriter(pipe[1])
    log = logger(writer)
    for number in range(10_000):
        log.info("%06d %s", number, "x" * 93)
    writer.flush()
    with os.fdopen(pipe[0]) as reader:
        got = dropped = 0
        while got + dropped < 10_000:
            line = reader.readline()
            if line.endswith("were dropped: nobody read them\n"):
                dropped += int(line.split()[0])
            else:
                assert int(line.split()[0]) == got + dropped  # what comes is in order and without a gap
                got += 1
        assert dropped > 5_000
        log.info("and on")
        assert reader.readline() == "and on\n"
    os.close(pipe[1])


def test_a_reader_that_is_gone_ends_nothing(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    writer = LogWriter(pipe[1])
    logger(writer).info("nobody")
    writer.flush()
    os.close(pipe[1])


def test_a_server_whose_parent_never_reads(data: Path) -> None:
    """Each refused request is a line at debug level: many times what the pipe holds."""
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)]
    process = subprocess.Popen(
        [*COMMANDS[DEVICE], *addresses, "--log-level", "debug"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    where = dict(entry.split("=", 1) for entry in process.stdout.readline().split()[1:])
    with httpx.Client(base_url=f"http://{where['http']}", trust_env=False, timeout=20) as client:
        for _ in range(300):
            assert client.get(f"/v1/models/{'x' * 200}/{'y' * 1000}").status_code == 404
        assert client.get("/healthz").json() == {"status": "ok"}
    process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()
    process.stderr.close()
