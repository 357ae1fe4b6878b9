"""The options of attach: which exclude each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from pushstep.proto.errors import InvalidSettings, UnsupportedModule

from ..membership.receipt import Receipt
from ..warn import warn

# Called with each step's receipt.
Progress = Callable[[Receipt], object]
Edits = Literal["sample", "check", "upload"]
EDITS: Final = ("sample", "check", "upload")


class Telling:
    """Gives `progress` each receipt, once, outside of everything that it could break by raising."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._told: Receipt | None = None

    def tell(self, receipt: Receipt | None) -> None:
        """Call it, unless it had this receipt. It may raise: the step is over, and the next one goes on from it."""
        if self._progress is not None and receipt is not None and receipt is not self._told:
            self._told = receipt
            self._progress(receipt)

    def tell_or_warn(self, receipt: Receipt | None) -> None:
        """The same where the session is about to leave, which it does whatever the call raises."""
        try:
            self.tell(receipt)
        except Exception as error:  # noqa: BLE001 - it is the user's
            warn(f"the progress= of attach has failed: {type(error).__name__}: {error}")


def check_options(edits: str, *, overlap: bool, prefetch: bool, progress: object = None) -> None:
    """Raise UnsupportedModule or InvalidSettings for options of attach that exclude each other."""
    if overlap and prefetch:
        raise UnsupportedModule(
            problem="with prefetch the whole exchange overlaps the next step's compute: attach without overlap"
        )
    if progress is not None and not callable(progress):
        raise InvalidSettings(
            problem=f"progress={progress!r}: it is called with each step's receipt, as lambda receipt: bar.update()"
        )
    if edits not in EDITS:
        raise InvalidSettings(problem=f"edits={edits!r}: it is one of {', '.join(EDITS)}")
    if edits == "upload" and prefetch:
        raise InvalidSettings(
            problem='with prefetch the parameters here are a step behind the server\'s, so edits="upload" would undo the step '
            "that is on its way: attach without one of them"
        )
