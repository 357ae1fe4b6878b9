"""Python's search for garbage, kept off what lives as long as a model does.

The search looks at every object there is while all threads wait: for a third of a second beside the layouts of some ten
thousand parameters, at any time, also on the event loop. What a large model consists of is set aside from it; when a
model goes, or memory is short, everything is looked at again.
"""

from __future__ import annotations

import gc

from .threads import INLINE_PARTS


def set_aside(parts: int) -> None:
    """Look no more at what is there now. Nothing if what has been made, of so many parts, is small."""
    if parts > INLINE_PARTS:
        gc.freeze()


def look_again() -> None:
    """Look at everything the next time."""
    gc.unfreeze()


def collect() -> None:
    """Let go of all garbage there is, now."""
    look_again()
    gc.collect()
