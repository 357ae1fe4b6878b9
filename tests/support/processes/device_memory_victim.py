"""A worker that is killed at a chosen point of a step through memory of the device: `... ADDRESS DEVICE FOLDER`.

FOLDER is the driver model's where the device is a modelled one; see shared_memory_victim.py for the rest.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pushstep.client import connect
from pushstep.client.attachment.parameters import Parameters
from pushstep.client.shared_memory import region
from pushstep.client.shared_memory.imported_memory import ImportedMemory
from pushstep.client.shared_memory.local_socket import LocalSocket
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from tests.support.cuda import modelled_driver
from tests.support.processes.shared_memory_victim import ELEMENTS, die, die_soon, serve


def arm(point: str) -> None:
    """Have this process die when it next comes to `point`."""
    exchange, unmap = LocalSocket.exchange, ImportedMemory._unmap

    def sent(*args: Any) -> Any:
        threading.Thread(target=die_soon).start()
        return exchange(*args)

    def closed(memory: ImportedMemory) -> None:
        unmap(memory)
        die()

    places: dict[str, tuple[Any, str, Any]] = {
        "asked": (region, "_import", die),
        "handed over": (device_memory.driver, "open", die),
        "open": (device_memory.driver, "tensor", die),
        "written": (LocalSocket, "exchange", die),
        "sent": (LocalSocket, "exchange", sent),
        "answered": (region.Region, "answer_of", die),
        "copying out": (Parameters, "take", die),
        "closed": (ImportedMemory, "_unmap", closed),
    }
    setattr(*places[point])


def live_and_die(address: str, model: str, point: str) -> None:
    device = torch.device(sys.argv[2])
    if device.type == "cpu":
        modelled_driver.install(Path(sys.argv[3]))
    early = point in ("asked", "handed over", "open")
    if early:
        arm(point)
    session = connect(address, model=model, worker="victim", timeout_s=20, retry_for_s=20, takeover=True)
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS, device=device))
    remote = session.attach(torch.optim.Adadelta([parameter]), names=["w"])
    parameter.grad = torch.full_like(parameter, 0.5)
    remote.step()
    arm(point)
    if point == "closed":
        session.memory.drop()
    remote.step()
    time.sleep(5)  # a quick step is over before whoever kills it has woken


if __name__ == "__main__":
    serve(live_and_die)
