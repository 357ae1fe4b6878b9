"""The public path of `wire/layout.py`, which programs outside this repository import."""

from .wire.layout import Layout as Layout
from .wire.layout import Slot as Slot

__all__ = ["Layout", "Slot"]
