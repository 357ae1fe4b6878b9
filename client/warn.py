"""Warnings that point at the user's line.

torch, its hooks and its schedulers put a varying number of frames between the user's line and this package's, so a
fixed `stacklevel` would point at the wrong line.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_NOT_THE_USER_S = tuple(str(Path(file).parent) + "/" for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Issue a RuntimeWarning at the nearest calling line that is neither this package's nor torch's."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER_S):
        frame = frame.f_back
        level += 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
