"""Draws the loss curves of all trainings over the number of batches seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

SMOOTHED_OVER: Final = 25


def draw_losses(path: Path, curves: Mapping[str, Sequence[float]], *, caption: str) -> None:
    """Write a PNG of the labelled curves: a loss per batch, as running means over `SMOOTHED_OVER`."""
    # pyplot would choose a display backend and change global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, losses in curves.items():
        smooth = smoothed(losses)
        first = len(losses) - len(smooth) + 1
        axes.plot(np.arange(first, first + len(smooth)), smooth, label=label, linewidth=1.2)
    axes.set_xlabel("batch")
    axes.set_ylabel(f"training loss (mean of {SMOOTHED_OVER})")
    axes.set_title(caption, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def smoothed(losses: Sequence[float]) -> np.ndarray[Any, Any]:
    """The running mean; the window is at most half of the losses, so that a short run still has a curve."""
    window = min(SMOOTHED_OVER, max(1, len(losses) // 2))
    return np.convolve(np.asarray(losses, dtype=np.float64), np.full(window, 1 / window), mode="valid")
