"""Memory of a CUDA device that two processes of one host use, by the driver's own interprocess handles.

One side allocates and exports, the other opens what it was told: 64 plain bytes, which the driver alone can read. The
calls are the driver's, by ctypes: torch's own way of sharing pickles, and shares memory of its caching allocator, in
which other tensors lie. For the same reason allocations are whole multiples of 2 MiB: smaller ones may be cut from a
block that others lie in, and it is the block that is exported.

Who has exported memory must not free it while another process has it open (what happens then is undefined), so the
importer says when it has closed it; see `server/exported_memory.py`. Nothing here waits for a device but `free`,
`allocate`, `close` and the streams' `synchronize`.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any, Final, Protocol

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from .errors import NoSharedMemory
from .types_pb2 import DeviceMemory

UUID_BYTES: Final = 16
HANDLE_BYTES: Final = 64
GRAIN_BYTES: Final = 2 << 20
_LAZY_PEER_ACCESS: Final = 1


class Stream(Protocol):
    """A stream of a device, as torch has them."""

    def synchronize(self) -> None:
        """Wait until all that it was asked for is done."""


class Driver(Protocol):
    """What is asked of a device's driver. NoSharedMemory, with the reason, where it refuses."""

    def serves(self, where: torch.device) -> bool:
        """Whether tensors there are this driver's."""

    def uuid(self, where: torch.device) -> bytes:
        """Which device it is, whatever its number is in which process."""

    def allocate(self, where: torch.device, nbytes: int) -> int:
        """Memory to be exported: its address."""

    def free(self, where: torch.device, address: int) -> None:
        """Give it back. Nobody has it open any more."""

    def export(self, where: torch.device, address: int) -> bytes:
        """The handle of an allocation."""

    def open(self, where: torch.device, handle: bytes) -> int:
        """Another process's memory: its address here."""

    def close(self, where: torch.device, address: int) -> None:
        """Undo one `open`. Nothing uses it any more."""

    def extent(self, where: torch.device, address: int) -> int:
        """The bytes from an address up to the end of what was allocated or opened there."""

    def tensor(self, where: torch.device, address: int, nbytes: int) -> Tensor:
        """These bytes, flat, for as long as they are allocated or open."""

    def stream(self, where: torch.device) -> Stream:
        """The calling thread's."""


def checked(message: bytes, uuid: bytes, nbytes: int) -> bytes:
    """The handle in a DeviceMemory that another process sent; NoSharedMemory unless it is of that device and size."""
    try:
        sent = DeviceMemory.FromString(message)
    except DecodeError as error:
        raise NoSharedMemory(problem="what was sent is no DeviceMemory") from error
    if sent.device_uuid != uuid:
        raise NoSharedMemory(problem=f"it is of device {sent.device_uuid.hex()}, not of {uuid.hex()}")
    if len(sent.handle) != HANDLE_BYTES or sent.size_bytes != nbytes:
        raise NoSharedMemory(
            problem=f"a handle of {len(sent.handle)} bytes for {sent.size_bytes} is not one of {HANDLE_BYTES} for {nbytes}"
        )
    return bytes(sent.handle)


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _Bytes:
    """What torch makes a tensor of that lies over device memory."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDriver:
    """libcuda. Loaded when it is first asked for something."""

    def serves(self, where: torch.device) -> bool:
        """Whether it is a CUDA device."""
        return where.type == "cuda"

    def uuid(self, where: torch.device) -> bytes:
        """The device's, or its MIG instance's."""
        found = (ctypes.c_ubyte * UUID_BYTES)()
        self._call("cuDeviceGetUuid_v2", found, self._device(where))
        return bytes(found)

    def allocate(self, where: torch.device, nbytes: int) -> int:
        """cuMemAlloc, in whole grains."""
        address = ctypes.c_uint64()
        with self._context(where):
            size = -(-nbytes // GRAIN_BYTES) * GRAIN_BYTES
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, where: torch.device, address: int) -> None:
        """cuMemFree, which waits for the device."""
        with self._context(where):
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, where: torch.device, address: int) -> bytes:
        """cuIpcGetMemHandle."""
        handle = _Handle()
        with self._context(where):
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def open(self, where: torch.device, handle: bytes) -> int:
        """cuIpcOpenMemHandle."""
        address = ctypes.c_uint64()
        given = _Handle.from_buffer_copy(handle)
        with self._context(where):
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
        return address.value

    def close(self, where: torch.device, address: int) -> None:
        """cuIpcCloseMemHandle."""
        with self._context(where):
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def extent(self, where: torch.device, address: int) -> int:
        """cuMemGetAddressRange."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._context(where):
            self._call(
                "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
            )
        return base.value + size.value - address

    @torch.inference_mode(False)  # what is made in that mode may only be written to in it
    def tensor(self, where: torch.device, address: int, nbytes: int) -> Tensor:
        """Over the memory itself: NoSharedMemory if torch would copy it."""
        try:
            made = torch.as_tensor(_Bytes(address, nbytes), dtype=torch.uint8, device=where)
        except RuntimeError as error:
            raise NoSharedMemory(problem=f"torch does not take the device's memory ({error})") from error
        if made.data_ptr() != address:
            raise NoSharedMemory(problem="torch has made a copy of the device's memory")
        return made

    def stream(self, where: torch.device) -> Stream:
        """torch's current one."""
        return torch.cuda.current_stream(where)

    # The library.

    @cached_property
    def _library(self) -> Any:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoSharedMemory(problem=f"the driver's library cannot be loaded ({error})") from error
        code = library.cuInit(0)
        if code:
            raise NoSharedMemory(problem=f"cuInit failed with CUDA error {code}")
        return library

    def _call(self, name: str, *arguments: Any) -> None:
        library = self._library
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise NoSharedMemory(problem=f"the driver is too old: it has no {name}") from error
        code = function(*arguments)
        if code:
            text = ctypes.c_char_p()
            library.cuGetErrorName(code, ctypes.byref(text))
            known = (text.value or b"unknown").decode()
            raise NoSharedMemory(problem=f"{name} failed with CUDA error {code} ({known})")

    def _device(self, where: torch.device) -> int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), where.index or 0)
        return device.value

    @cache  # noqa: B019 - there is one driver in a process
    def _primary(self, device: int) -> int:
        """The context that torch uses, too; kept for as long as the process lives."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        if context.value is None:
            raise NoSharedMemory(problem="the driver has given no context")
        return context.value

    @contextlib.contextmanager
    def _context(self, where: torch.device) -> Iterator[None]:
        """Make it the calling thread's for the length of a block, whatever that thread has used before."""
        with _loading:
            context = self._primary(self._device(where))
        self._call("cuCtxPushCurrent_v2", ctypes.c_void_p(context))
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))


_loading = threading.RLock()
# Tests put another one here.
driver: Driver = CudaDriver()
