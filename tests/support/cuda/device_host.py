"""A host with one CUDA device, real or modelled: its servers, and what its workers put on the device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pushstep.client import Session
from tests.support.cuda import modelled_driver
from tests.support.servers import harness
from tests.support.servers.harness import RunningServer


@dataclass
class DeviceHost:
    """Servers started by it hold their models on `device`, where tests put their parameters, too."""

    kind: str
    folder: Path
    patch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.device = torch.device("cuda", 0) if self.kind == "cuda" else torch.device("cpu")
        self.patch.setattr(harness, "DEVICE", self.kind)
        self.environment = {**os.environ, modelled_driver.FOLDER: str(self.folder)}
        self.driver = None
        if self.kind == "modelled":
            self.driver = modelled_driver.install(self.folder, self.patch.setattr)

    @contextlib.contextmanager
    def server(self, data: Path, *options: str) -> Iterator[RunningServer]:
        """A server for the length of a block; nothing that it or its workers did is a fault of theirs."""
        with harness.running_server(data, *options, environment=self.environment) as running:
            yield running
        assert self.faults() == []

    def faults(self) -> list[str]:
        """What the model has found wrong."""
        return [] if self.driver is None else self.driver.faults()

    def allocations(self) -> list[str]:
        """What is exported, and what of it is open; of a real device nobody knows."""
        return [] if self.driver is None else self.driver.allocations()


def shares_device(session: Session) -> bool:
    """Whether a session's last step went through memory of the device."""
    region = session.memory.region
    return region is not None and region.local_socket.is_open() and region._imported is not None
