"""The element types that may cross the wire: the enum, torch's dtypes and their names, in one map each way.

int8 is not in the table: it is a type of blocks of elements, and only gradients travel in it.
"""

from __future__ import annotations

from typing import Final, cast

import torch

from ..errors import WrongDtype
from ..types_pb2 import DType


def name_of(dtype: torch.dtype) -> str:
    """torch's name of any dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


TORCH: Final[dict[int, torch.dtype]] = {
    DType.DTYPE_FLOAT32: torch.float32,
    DType.DTYPE_FLOAT64: torch.float64,
    DType.DTYPE_BFLOAT16: torch.bfloat16,
    DType.DTYPE_FLOAT16: torch.float16,
}
WIRE: Final[dict[torch.dtype, DType]] = {dtype: cast("DType", wire) for wire, dtype in TORCH.items()}
# a constant, since each segment of each push needs it and protobuf looks an enum's name up in Python
INT8: Final = DType.DTYPE_INT8
NAMES: Final[dict[torch.dtype, str]] = {dtype: name_of(dtype) for dtype in WIRE}
BY_NAME: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in NAMES.items()}

# The number of elements that share one scale.
# It divides the norms' block of 4096. Of normal gradients a block of 128, 256, 1024, 4096 takes 1.031, 1.016, 1.004, 1.001
# bytes per element and errs by 0.65, 0.70, 0.79, 0.87 % (root mean square over the standard deviation).
INT8_BLOCK: Final = 256
INT8_SCALE_BYTES: Final = 4


def int8_bytes(elements: int) -> int:
    """Bytes that a parameter or row of so many elements takes in int8: its codes and its blocks' scales."""
    return elements + INT8_SCALE_BYTES * -(-elements // INT8_BLOCK)


def of_push(wire: int, what: str) -> torch.dtype:
    """The torch dtype of an enum value in a push's segment: as `to_torch`, and int8."""
    return torch.int8 if wire == INT8 else to_torch(wire, what)


def to_push(dtype: torch.dtype, what: str) -> DType:
    """The enum value of a torch dtype in a push's segment: as `to_wire`, and int8."""
    return INT8 if dtype == torch.int8 else to_wire(dtype, what)


def named(value: torch.dtype | str | None, what: str) -> torch.dtype | None:
    """A dtype given as itself or by its name; None stays None. WrongDtype for what cannot travel."""
    allowed = BY_NAME | {"int8": torch.int8}
    if value is None or value in allowed.values():
        return value if isinstance(value, torch.dtype) else None
    if isinstance(value, str) and value in allowed:
        return allowed[value]
    raise WrongDtype(what=what, got=value, expected=", ".join(allowed))


def to_torch(wire: int, what: str) -> torch.dtype:
    """The torch dtype of an enum value. WrongDtype for a value that has none."""
    dtype = TORCH.get(wire)
    if dtype is None:
        raise WrongDtype(what=what, got=f"enum value {wire}", expected=", ".join(NAMES.values()))
    return dtype


def to_wire(dtype: torch.dtype, what: str) -> DType:
    """The enum value of a torch dtype. WrongDtype for a dtype that cannot be sent."""
    wire = WIRE.get(dtype)
    if wire is None:
        raise WrongDtype(what=what, got=str(dtype), expected=", ".join(NAMES.values()))
    return wire


def to_wire_or_own(dtype: torch.dtype | None, what: str) -> DType:
    """The same; None is each parameter's own dtype."""
    return DType.DTYPE_UNSPECIFIED if dtype is None else to_wire(dtype, what)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's optimizer state: float32 for half types, else the parameter's own."""
    return torch.float32 if dtype.itemsize == 2 else dtype
