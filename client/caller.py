"""Whoever called into this package: the line that a warning is about.

Between the user's line and ours lie as many frames as torch, its hooks and its schedulers have put around a step, so
a fixed number of them points anywhere.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_NOT_THE_USER_S = tuple(str(Path(file).parent) + "/" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """A RuntimeWarning at the nearest line that is neither this package's nor torch's."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER_S):
        frame = frame.f_back
        level += 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
