"""What is refused before the driver is asked to open anything, and how the driver's refusals are named."""

from __future__ import annotations

import ctypes

import pytest
import torch

from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.shared_memory.cuda_ipc import HANDLE_BYTES, UUID_BYTES, CudaDriver, checked
from pushstep.proto.types_pb2 import DeviceMemory

UUID = bytes(range(UUID_BYTES))
HANDLE = bytes(range(HANDLE_BYTES))


def test_a_handle_is_what_was_sent() -> None:
    sent = DeviceMemory(device_uuid=UUID, handle=HANDLE, size_bytes=4096)
    assert checked(sent.SerializeToString(), UUID, 4096) == HANDLE


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (DeviceMemory(), "device"),
        (DeviceMemory(device_uuid=UUID[:-1], handle=HANDLE, size_bytes=4096), "device"),
        (DeviceMemory(device_uuid=UUID[::-1], handle=HANDLE, size_bytes=4096), "device"),
        (DeviceMemory(device_uuid=UUID, handle=HANDLE[:-1], size_bytes=4096), "63 bytes"),
        (DeviceMemory(device_uuid=UUID, handle=HANDLE + b"\0", size_bytes=4096), "65 bytes"),
        (DeviceMemory(device_uuid=UUID, handle=HANDLE, size_bytes=4095), "4095"),
        (DeviceMemory(device_uuid=UUID, handle=HANDLE, size_bytes=1 << 60), str(1 << 60)),
        (b"\xff\xff", "no DeviceMemory"),
    ],
)
def test_another_is_refused_by_name(sent: DeviceMemory | bytes, problem: str) -> None:
    message = sent if isinstance(sent, bytes) else sent.SerializeToString()
    with pytest.raises(NoSharedMemory, match=problem):
        checked(message, UUID, 4096)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver, where = CudaDriver(), torch.device("cuda", 0)
    assert driver.serves(where)
    assert not driver.serves(torch.device("cpu"))
    for ask in (driver.uuid, lambda at: driver.allocate(at, 1), lambda at: driver.open(at, HANDLE)):
        with pytest.raises(NoSharedMemory, match=r"libcuda\.so\.1"):
            ask(where)


class FakeLibrary:
    """What libcuda answers: nothing but errors, once it is loaded."""

    def __getattr__(self, name: str) -> object:
        if name == "cuDeviceGetUuid_v2":
            raise AttributeError(name)
        return lambda *_: 0 if name in ("cuInit", "cuDeviceGet", "cuGetErrorName") else 999


def test_what_the_driver_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory.ctypes, "CDLL", lambda name: FakeLibrary())
    driver, where = CudaDriver(), torch.device("cuda", 0)
    with pytest.raises(NoSharedMemory, match="too old: it has no cuDeviceGetUuid_v2"):
        driver.uuid(where)
    with pytest.raises(NoSharedMemory, match="cuDevicePrimaryCtxRetain failed with CUDA error 999"):
        driver.allocate(where, 1)


@pytest.mark.gpu
def test_an_allocation_and_its_handle() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    driver, where = CudaDriver(), torch.device("cuda", 0)
    assert len(driver.uuid(where)) == UUID_BYTES
    address = driver.allocate(where, 5_000_000)
    assert driver.extent(where, address) >= 5_000_000
    assert len(driver.export(where, address)) == HANDLE_BYTES
    memory = driver.tensor(where, address, 5_000_000)
    assert (memory.device, memory.data_ptr()) == (where, address)
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 35_000_000
    driver.stream(where).synchronize()
    driver.free(where, address)
    with pytest.raises(NoSharedMemory, match="cuIpcOpenMemHandle"):
        driver.open(where, b"\1" * HANDLE_BYTES)
