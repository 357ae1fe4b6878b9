"""What models, workers and parameters may be called: a name has to work wherever it is used.

Names of models and workers stand in URLs, file names and logs. A parameter's name is a key of exports, a path of REST, a word in errors and logs, and text on the wire. A name that one of these
cannot carry is refused when the model is made, or else its first export would fail.
"""

from __future__ import annotations

import re
from typing import Final

from ..errors import InvalidManifest, InvalidName
from ..types_pb2 import Manifest, Parameter
from .limits import limit_of

MAX_NAME_BYTES: Final = limit_of(Parameter, "name").bytes
_SHOWN: Final = 100
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# safetensors keeps this key for itself: a file with a tensor of that name cannot be read
_OF_SAFETENSORS: Final = "__metadata__"
# web clients resolve these parts of a path before they send it
_PLACES: Final = frozenset((".", ".."))


def is_name(name: object) -> bool:
    """Whether `name` is valid for a model or a worker."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """`name` if it is valid, else InvalidName. `what` says in the message what it names."""
    if not is_name(name):
        raise InvalidName(name=str(name)[:200], what=what)
    return name


def check_names(manifest: Manifest) -> None:
    """InvalidManifest unless a new model may have these names. A model that exists keeps its own."""
    for parameter in manifest.parameters:
        if parameter.whole_rows or parameter.first_row:
            raise InvalidManifest(
                problem=f"{parameter.name!r} is a piece: send the manifest of the whole model"
            )
        for name in (parameter.name, *parameter.aliases):
            check_parameter_name(name)


def check_parameter_name(name: str) -> str:
    """`name` if it is valid, else InvalidManifest with what is wrong with it."""
    problem = _problem(name)
    if problem:
        # as ASCII: the name may hold surrogates, which no encoding can write
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
