"""The element types that may cross the wire: the enum, torch's dtypes and their names, in one table."""

from __future__ import annotations

from typing import Final, cast

import torch

from .errors import WrongDtype
from .types_pb2 import DType

TORCH: Final[dict[int, torch.dtype]] = {
    DType.DTYPE_FLOAT32: torch.float32,
    DType.DTYPE_FLOAT64: torch.float64,
    DType.DTYPE_BFLOAT16: torch.bfloat16,
    DType.DTYPE_FLOAT16: torch.float16,
}
WIRE: Final[dict[torch.dtype, DType]] = {dtype: cast("DType", wire) for wire, dtype in TORCH.items()}
NAMES: Final[dict[torch.dtype, str]] = {dtype: str(dtype).removeprefix("torch.") for dtype in WIRE}


def to_torch(wire: int, what: str) -> torch.dtype:
    """The torch dtype of an enum value; WrongDtype for one that has none."""
    dtype = TORCH.get(wire)
    if dtype is None:
        raise WrongDtype(what=what, got=f"enum value {wire}", expected=", ".join(NAMES.values()))
    return dtype


def to_wire(dtype: torch.dtype, what: str) -> DType:
    """The enum value of a torch dtype; WrongDtype for one that cannot be sent."""
    wire = WIRE.get(dtype)
    if wire is None:
        raise WrongDtype(what=what, got=str(dtype), expected=", ".join(NAMES.values()))
    return wire


def itemsize(dtype: torch.dtype) -> int:
    """Bytes per element."""
    return dtype.itemsize


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's optimizer state: float32 for half types, else the parameter's own."""
    return torch.float32 if dtype.itemsize == 2 else dtype
