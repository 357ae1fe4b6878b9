"""The options of attach that exclude each other."""

from __future__ import annotations

from typing import Final, Literal

from pushstep.proto.errors import InvalidSettings, UnsupportedModule

Edits = Literal["sample", "check", "upload"]
EDITS: Final = ("sample", "check", "upload")


def check_options(edits: str, *, overlap: bool, prefetch: bool) -> None:
    """Raise UnsupportedModule or InvalidSettings for options of attach that exclude each other."""
    if overlap and prefetch:
        raise UnsupportedModule(
            problem="with prefetch the whole exchange overlaps the next step's compute: attach without overlap"
        )
    if edits not in EDITS:
        raise InvalidSettings(problem=f"edits={edits!r}: it is one of {', '.join(EDITS)}")
    if edits == "upload" and prefetch:
        raise InvalidSettings(
            problem='with prefetch the parameters here are a step behind the server\'s, so edits="upload" would undo the step '
            "that is on its way: attach without one of them"
        )
