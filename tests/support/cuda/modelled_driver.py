"""A model of CUDA's interprocess memory between real processes: allocations are files, handles their names.

It holds both sides to what CUDA's documentation asks of them: memory is freed only when no living process has it open,
handles are 64 bytes, what is opened is closed, and copies to memory that another process has exported are done no
sooner than somebody waits for the stream. A fault is a line in the file `faults` of the folder that all processes share.
"""

from __future__ import annotations

import mmap
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pushstep.client.shared_memory import region
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.shared_memory.cuda_ipc import HANDLE_BYTES, UUID_BYTES

FOLDER = "PUSHSTEP_MODELLED_DRIVER"


class ModelledDriver:
    """The driver of a device whose memory is the host's: torch has its tensors on the CPU."""

    def __init__(self, folder: Path, number: int = 1) -> None:
        """`number`: which device it is."""
        self.folder = folder
        self.number = number
        # what this process has made or opened, by address
        self.held: dict[int, tuple[Path, mmap.mmap]] = {}
        # what each thread has asked for, and not waited for
        self._asked: dict[int, list[tuple[Tensor, Tensor]]] = {}
        folder.mkdir(exist_ok=True)

    def serves(self, where: torch.device) -> bool:
        return where.type == "cpu"

    def uuid(self, where: torch.device) -> bytes:
        return self.number.to_bytes(UUID_BYTES)

    def allocate(self, where: torch.device, nbytes: int) -> int:
        path = self.folder / f"memory-{uuid.uuid4().hex}"
        path.touch()
        os.truncate(path, nbytes)
        return self._held(path)

    def free(self, where: torch.device, address: int) -> None:
        path, memory = self.held.pop(address)
        memory[:] = b"\xff" * len(memory)  # whoever still reads it reads NaN
        for opened in self.folder.glob(f"{path.name}.*"):
            if _lives(int(opened.suffix[1:])):
                self.fault(f"{path.name} was freed while {opened.suffix[1:]} has it open")
            opened.unlink(missing_ok=True)
        path.unlink()

    def export(self, where: torch.device, address: int) -> bytes:
        return self.held[address][0].name.encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, where: torch.device, handle: bytes) -> int:
        path = self.folder / handle.rstrip(b"\0").decode()
        if len(handle) != HANDLE_BYTES or not path.exists():
            raise NoSharedMemory(problem="open failed with error 400")
        if path in [held for held, _ in self.held.values()]:
            raise NoSharedMemory(problem="open failed with error 201: it is this process's own")
        (self.folder / f"{path.name}.{os.getpid()}").touch()
        return self._held(path)

    def close(self, where: torch.device, address: int) -> None:
        path, _ = self.held.pop(address)
        asked = [target for copies in list(self._asked.values()) for target, _ in copies]
        if any(_start(target) <= address < _start(target) + target.nbytes for target in asked):
            self.fault(f"{path.name} was closed while copies to it are under way")
        (self.folder / f"{path.name}.{os.getpid()}").unlink()

    def extent(self, where: torch.device, address: int) -> int:
        return len(self.held[address][1])

    @torch.inference_mode(False)
    def tensor(self, where: torch.device, address: int, nbytes: int) -> Tensor:
        return torch.frombuffer(self.held[address][1], dtype=torch.uint8)[:nbytes]

    def stream(self, where: torch.device) -> ModelledDriver:
        """There is one in each thread."""
        return self

    def synchronize(self) -> None:
        for target, source in self._asked.pop(threading.get_ident(), []):
            target.copy_(source)

    # What is watched.

    def copy_all(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """`copy` of each."""
        for target, source in zip(targets, sources, strict=True):
            self.copy(target, source)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """A copy to what was opened, as lazy as a device may be."""
        with torch.no_grad():
            if any(address <= target.data_ptr() < address + len(m) for address, (_, m) in self.held.items()):
                self._asked.setdefault(threading.get_ident(), []).append((target, source))
            else:
                target.copy_(source)

    def fault(self, what: str) -> None:
        with (self.folder / "faults").open("a") as faults:
            faults.write(f"{what}\n")

    def faults(self) -> list[str]:
        """What any of the processes has done wrong."""
        path = self.folder / "faults"
        return path.read_text().splitlines() if path.exists() else []

    def take_faults(self) -> list[str]:
        """The same, and they are forgotten."""
        found = self.faults()
        (self.folder / "faults").unlink(missing_ok=True)
        return found

    def allocations(self) -> list[str]:
        """What is allocated, and what is open by which process."""
        return sorted(path.name for path in self.folder.glob("memory-*"))

    def _held(self, path: Path) -> int:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        address = _start(torch.frombuffer(memory, dtype=torch.uint8))
        self.held[address] = path, memory
        return address


def install(folder: Path, setattr_: Callable[[Any, str, Any], object] = setattr) -> ModelledDriver:
    """Put the model in the driver's place, in this process; `setattr_` may be a monkeypatch's."""
    driver = ModelledDriver(folder)
    setattr_(device_memory, "driver", driver)
    setattr_(region, "copy", driver.copy)
    setattr_(region, "copy_all", driver.copy_all)
    return driver


def _start(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _lives(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
