"""What a parameter may be called: whatever works everywhere that a name goes.

A name is a key of exports, a path of REST, a word in errors and logs, and text on the wire. What one of these cannot
carry is refused when the model is made, and not found out by whoever exports it.
"""

from __future__ import annotations

from typing import Final

from .errors import InvalidManifest
from .limits import limit_of
from .types_pb2 import Parameter

MAX_NAME_BYTES: Final = limit_of(Parameter, "name").bytes
_SHOWN: Final = 100
# safetensors keeps this key for itself: a file with a tensor of that name cannot be read
_OF_SAFETENSORS: Final = "__metadata__"
# what stands for a place in a path, which web clients resolve before they send it
_PLACES: Final = frozenset((".", ".."))


def check_parameter_name(name: str) -> str:
    """`name`, or InvalidManifest with what is wrong with it."""
    problem = _problem(name)
    if problem:
        # as ascii: it may be no text at all
        raise InvalidManifest(problem=f"parameter name {name[:_SHOWN]!a} {problem}: give it another name")
    return name


def _problem(name: str) -> str:
    if not name:
        return "is empty"
    length_bytes = len(name.encode(errors="surrogatepass"))
    if length_bytes > MAX_NAME_BYTES:
        return f"has {length_bytes} bytes, more than {MAX_NAME_BYTES}"
    if name == _OF_SAFETENSORS:
        return "is kept by the safetensors format for itself"
    if not name.isprintable():
        wrong = next(character for character in name if not character.isprintable())
        return f"holds U+{ord(wrong):04X}, which is not printable"
    if not _PLACES.isdisjoint(name.split("/")):
        return "has '.' or '..' between slashes, which a path of REST cannot hold"
    return ""
