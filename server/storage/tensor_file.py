"""The server's safetensors files. The bytes that are loaded from one are the very bytes that were verified.

The file is read once, into memory of its own, and its digest is taken on the way. safetensors' own `load_file` maps the
file: it may change after it was verified, and if the disk cannot read it, the mapping ends the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from pushstep.proto.wire.layout import MAX_ELEMENTS

from ..pacing.pace import AT_ONCE, Pace
from ..process.memory import take
from .store import Source

READ_BYTES: Final = 8 << 20
# Digests of files by their names in a manifest. They are against damage, not against forgery, so the fast one is written.
# Older snapshots have the other one.
DIGEST: Final = "xxh3_128"
_DIGESTS: Final[Mapping[str, Callable[[], Any]]] = {DIGEST: xxhash.xxh3_128, "sha256": hashlib.sha256}
# Element types by their names in a file. A module's buffers may have these types, too.
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES: Final = 8
# Room for some 40,000 tensors. A parsed header takes ten times as much as itself.
LONGEST_HEADER_BYTES: Final = 4 << 20
_Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    """One tensor's entry in the header."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: str
    shape: Annotated[list[_Count], Field(max_length=64)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_HEADER: Final = TypeAdapter(dict[str, _Entry])
_METADATA: Final = TypeAdapter(dict[str, str])
_SHOWN: Final = 100


class OtherBytes(Exception):
    """The file is not the one that was written."""


def digest_of(source: Source, kind: str = DIGEST, pace: Pace = AT_ONCE) -> str:
    """A digest of a file. Raises what its reading does."""
    digest = _DIGESTS[kind]()
    block = memoryview(bytearray(READ_BYTES))
    begun_s = time.monotonic()
    while count := source.readinto(block):
        digest.update(block[:count])
        pace.rest(time.monotonic() - begun_s, count)
        begun_s = time.monotonic()
    return str(digest.hexdigest())


def kept_digest(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The kind and the value of the digest in a file's entry, whose schema was checked."""
    return next((kind, entry[kind]) for kind in _DIGESTS if entry.get(kind) is not None)


def read_tensors(source: Source, name: str, size_bytes: int, kind: str, expected: str) -> dict[str, Tensor]:
    """The tensors of a file of this length and digest, by name, in memory of their own.

    Raises what its reading does; OtherBytes if it is another file, ValueError if it is not a safetensors file,
    OutOfMemory.
    """
    if source.size_bytes != size_bytes:
        raise OtherBytes("has another length")
    memory = take(size_bytes, torch.uint8, f"the snapshot's file {name}")
    content = memory.numpy().data if size_bytes else memoryview(b"")
    digest, filled = _DIGESTS[kind](), 0
    while filled < size_bytes:
        count = source.readinto(content[filled : filled + READ_BYTES])
        if not count:
            raise OtherBytes("has another length")
        digest.update(content[filled : filled + count])
        filled += count
    if digest.hexdigest() != expected:
        raise OtherBytes("has other bytes")
    return tensors_in(memory)


def tensors_in(memory: Tensor, longest_header_bytes: int = LONGEST_HEADER_BYTES) -> dict[str, Tensor]:
    """The tensors of a file that lies in memory, most of them in place.

    ValueError if it is not a safetensors file.
    """
    return tensors_and_metadata(memory, longest_header_bytes)[0]


def tensors_and_metadata(
    memory: Tensor, longest_header_bytes: int = LONGEST_HEADER_BYTES
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in the order of its header, and the texts that its writer has added.

    ValueError if it is not a safetensors file: each byte behind the header belongs to exactly one tensor.
    """
    content = memory.numpy().data if memory.numel() else memoryview(b"")
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if start > len(content) or length > longest_header_bytes:
        raise ValueError(f"its header is longer than the file, or than {longest_header_bytes} bytes")
    try:
        header = json.loads(bytes(content[_LENGTH_BYTES:start]))
        texts = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        metadata, entries = _METADATA.validate_python(texts), _HEADER.validate_python(header)
    except (ValueError, RecursionError, ValidationError) as error:
        raise ValueError("its header is not that of a safetensors file") from error
    _require_apart(entries, len(content) - start)
    return {name: _tensor(name, entry, memory[start:]) for name, entry in entries.items()}, metadata


def _require_apart(entries: Mapping[str, _Entry], data_bytes: int) -> None:
    """ValueError if tensors overlap or leave holes: copies of such tensors could be larger than the file."""
    end = 0
    for begin, stop in sorted(tuple(entry.data_offsets) for entry in entries.values()):
        if begin != end or stop < begin:
            raise ValueError("its tensors overlap, or leave a hole")
        end = stop
    if end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes, and {data_bytes} follow its header")


def _tensor(name: str, entry: _Entry, data: Tensor) -> Tensor:
    dtype, (begin, end) = _DTYPES.get(entry.dtype), entry.data_offsets
    if dtype is None:
        raise ValueError(f"{name[:_SHOWN]!r} is of an unknown type {entry.dtype[:20]!r}")
    # a length of 0 counts as 1, since the others become strides
    if math.prod(max(1, length) for length in entry.shape) >= MAX_ELEMENTS:
        raise ValueError(f"{name[:_SHOWN]!r} has an impossible shape")
    if end - begin != math.prod(entry.shape) * dtype.itemsize:
        raise ValueError(f"the place of {name[:_SHOWN]!r} is not that of its shape")
    if begin == end:
        return torch.empty(entry.shape, dtype=dtype, device="cpu")
    found = data[begin:end]
    # a view in another dtype needs an aligned address
    aligned = found if found.data_ptr() % dtype.itemsize == 0 else found.clone()
    return aligned.view(dtype).view(entry.shape)


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    alignment: int = _LENGTH_BYTES,
) -> tuple[bytes, int]:
    """The header of a file with tensors of these types and shapes, one behind the other, and the length of the file.

    The first tensor begins at a multiple of `alignment`. Tensors with large elements come first, or others are not aligned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, _LENGTH_BYTES + len(text) + end


def aligned_first(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in an order in which every tensor is aligned: the largest element size first."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors into a file, straight from where they lie. One under two names is written twice. OSError.

    safetensors' own `save_file` refuses tensors that share memory, so tied weights would be copied first.
    """
    names = aligned_first(tensors)
    header, _ = header_of({name: (tensors[name].dtype, tensors[name].shape) for name in names}, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            if tensors[name].numel():
                file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
