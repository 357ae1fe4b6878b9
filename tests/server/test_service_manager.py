"""What a service manager is told: at whatever address it listens, and nothing is lost if it does not."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from pushstep.server.service_manager import tell_manager


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_it_is_told_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@pushstep-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1) if kind == "abstract" else address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        tell_manager("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize(("address", "warnings"), [("", 0), ("{}/nobody", 1), ("{}/" + "long" * 50, 1)])
def test_without_one_nothing_happens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    address: str,
    warnings: int,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address.format(tmp_path))
    with caplog.at_level(logging.WARNING):
        tell_manager("STOPPING=1")
    assert len(caplog.records) == warnings
