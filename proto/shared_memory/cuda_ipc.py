"""CUDA device memory that two processes of one host share through the driver's interprocess handles.

One side allocates and exports. The other opens the handle, 64 opaque bytes that only the driver can read. The driver
is called through ctypes. torch's own sharing is not used: it pickles, and it shares memory of its caching allocator,
in which other tensors lie. For the same reason allocations are whole multiples of 2 MiB: the driver may cut a smaller
one from a block that holds others, and it exports the whole block.

Exported memory must not be freed while another process has it open: what happens then is undefined. So the importer
says when it has closed the memory; see `server/devices/exported_memory.py`. Only `free`, `allocate`, `close` and the
streams' `synchronize` wait for a device.
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

from ..errors import NoSharedMemory
from ..types_pb2 import DeviceMemory

UUID_BYTES: Final = 16
HANDLE_BYTES: Final = 64
GRAIN_BYTES: Final = 2 << 20
_LAZY_PEER_ACCESS: Final = 1


class Stream(Protocol):
    """A device stream, with the part of torch's interface that is used."""

    def synchronize(self) -> None:
        """Wait until all work queued on the stream is done."""


class Driver(Protocol):
    """The calls of a device's driver that sharing needs. NoSharedMemory, with the reason, if it refuses."""

    def serves(self, where: torch.device) -> bool:
        """Whether tensors on that device are this driver's."""

    def uuid(self, where: torch.device) -> bytes:
        """The device's UUID of 16 bytes, which is the same in every process; the device's number is not."""

    def allocate(self, where: torch.device, nbytes: int) -> int:
        """Allocate memory that can be exported; its address."""

    def free(self, where: torch.device, address: int) -> None:
        """Free an allocation. No other process may have it open."""

    def export(self, where: torch.device, address: int) -> bytes:
        """The handle of an allocation: 64 bytes."""

    def open(self, where: torch.device, handle: bytes) -> int:
        """Open another process's memory; its address in this process."""

    def close(self, where: torch.device, address: int) -> None:
        """Undo one `open`. Nothing may use the memory any more."""

    def extent(self, where: torch.device, address: int) -> int:
        """The bytes from an address to the end of the allocated or opened memory that holds it."""

    def tensor(self, where: torch.device, address: int, nbytes: int) -> Tensor:
        """These bytes as a flat uint8 tensor, which is valid while they are allocated or open."""

    def stream(self, where: torch.device) -> Stream:
        """The calling thread's current stream."""


def checked(message: bytes, uuid: bytes, nbytes: int) -> bytes:
    """The handle in a DeviceMemory that another process sent. NoSharedMemory if device or size differ."""
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
    """Device memory with the interface that torch needs to make a tensor over it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDriver:
    """The driver of CUDA devices: libcuda, which is loaded at the first call."""

    def serves(self, where: torch.device) -> bool:
        """Whether the device is a CUDA device."""
        return where.type == "cuda"

    def uuid(self, where: torch.device) -> bytes:
        """The UUID of the device, or of its MIG instance."""
        found = (ctypes.c_ubyte * UUID_BYTES)()
        self._call("cuDeviceGetUuid_v2", found, self._device(where))
        return bytes(found)

    def allocate(self, where: torch.device, nbytes: int) -> int:
        """cuMemAlloc of the size rounded up to a multiple of 2 MiB."""
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

    @torch.inference_mode(False)  # a tensor made in inference mode may only be written to in that mode
    def tensor(self, where: torch.device, address: int, nbytes: int) -> Tensor:
        """A tensor over the memory itself. NoSharedMemory if torch refuses it or has made a copy."""
        try:
            made = torch.as_tensor(_Bytes(address, nbytes), dtype=torch.uint8, device=where)
        except RuntimeError as error:
            raise NoSharedMemory(problem=f"torch does not take the device's memory ({error})") from error
        if made.data_ptr() != address:
            raise NoSharedMemory(problem="torch has made a copy of the device's memory")
        return made

    def stream(self, where: torch.device) -> Stream:
        """torch's current stream of the device."""
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
        """The device's primary context, which torch uses, too. It is kept until the process ends."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        if context.value is None:
            raise NoSharedMemory(problem="the driver has given no context")
        return context.value

    @contextlib.contextmanager
    def _context(self, where: torch.device) -> Iterator[None]:
        """Make the primary context the calling thread's for a block, whatever its context was before."""
        with _loading:
            context = self._primary(self._device(where))
        self._call("cuCtxPushCurrent_v2", ctypes.c_void_p(context))
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))


_loading = threading.RLock()
# Tests replace it.
driver: Driver = CudaDriver()
