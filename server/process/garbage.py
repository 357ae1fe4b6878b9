"""Keeps Python's garbage collector off the objects that live as long as a model.

A collection visits every object while all threads wait: a third of a second beside the layouts of some ten thousand
parameters, at any time, also on the event loop. So the objects of a large model are set aside. When a model goes, or
memory is short, everything is visited again.
"""

from __future__ import annotations

import gc

from .inline import INLINE_PARTS


def set_aside(parts: int) -> None:
    """Set aside all objects that exist now.

    Does nothing if what was made is small: `parts` is its number of parts.
    """
    if parts > INLINE_PARTS:
        gc.freeze()


def look_again() -> None:
    """Have the next collection visit everything."""
    gc.unfreeze()


def collect() -> None:
    """Collect all garbage now, also among the objects that were set aside."""
    look_again()
    gc.collect()
