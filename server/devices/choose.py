"""Which device a setting names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from .device import Device


def _cuda(index: int) -> Device:
    from .cuda import CudaDevice  # Triton and the driver, only where there is a GPU

    return CudaDevice(index)


# By the name before the colon: makes the device with the number after it.
DEVICES: Final[Mapping[str, Callable[[int], Device]]] = {"cpu": lambda index: Device(), "cuda": _cuda}


def split_device(name: str) -> tuple[str, int]:
    """A setting as (kind, number): "cpu", "cuda" or "cuda:N". ValueError if there is no such device."""
    kind, _, number = name.partition(":")
    if kind not in DEVICES or (number and not number.isdigit()):
        raise ValueError(f"unknown device {name!r}: use cpu, cuda or cuda:N")
    return kind, int(number or 0)


def device(name: str) -> Device:
    """The device of a setting."""
    kind, number = split_device(name)
    return DEVICES[kind](number)
