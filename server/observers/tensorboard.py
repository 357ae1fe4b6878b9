"""TensorBoard: each step's numbers as scalars, in event files under the server's data folder."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import Field

from pushstep.proto.errors import MissingExtra

from ..coordinator.hooks.hook import Hook, Place, Point
from ..coordinator.settings import Positive, Settings

FOLDER: Final = "tensorboard"
# A killed server has lost no more of its event files than this.
FLUSH_S: Final = 1.0
SCALARS: Final = ("gradient_norm", "clip_factor", "staleness", "step_s")


class TensorBoardSettings(Settings):
    """How often to write."""

    every: Positive = Field(1, description="write each n-th step only")


class TensorBoard(Hook):
    """Writes each step's loss and other metrics, gradient norm, clipping, staleness, duration, and each group's lr.

    `tensorboard --logdir DATA/tensorboard` shows them, by model and hook; a step's number is its version. After a restore
    the scalars of what it has undone are hidden.
    """

    name: ClassVar[str] = "tensorboard"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_POST})
    settings_type: ClassVar[type[Settings]] = TensorBoardSettings
    settings: TensorBoardSettings

    def __init__(self, hook_id: str, point: Point, settings: TensorBoardSettings) -> None:
        super().__init__(hook_id, point, settings)
        self._seen = 0
        self._place: Place | None = None
        self._writer: Any = None
        self._timeline = 0
        self._flushed_s = 0.0

    def prepare(self, place: Place) -> None:
        """MissingExtra if TensorBoard is not installed."""
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtra(what=f"the hook {self.name}", package="tensorboard", extra="tensorboard")

    def open(self, place: Place) -> None:
        """Begin. MissingExtra."""
        self.prepare(place)
        self._place = place

    def observe(self, event: Mapping[str, Any]) -> None:
        """Write a step."""
        self._seen += 1
        if self._place is None or self._seen % self.settings.every:
            return
        version = int(event["version"])
        writer = self._writer_of(int(event["timeline"]), version)
        scalars = {name: event[name] for name in SCALARS if event.get(name) is not None}
        scalars |= {f"metrics/{name}": value for name, value in event["metrics"].items()}
        scalars |= {f"lr/group_{group}": lr for group, lr in event["lrs"].items()}
        for name, value in scalars.items():
            writer.add_scalar(name, value, version, walltime=event["time"])
        if time.monotonic() - self._flushed_s >= FLUSH_S:
            self._flush()

    def close(self) -> None:
        """Write out everything and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        self._flushed_s = time.monotonic()
        if self._writer is not None:
            self._writer.flush()

    def _writer_of(self, timeline: int, version: int) -> Any:
        """The writer; a new one for each timeline, which hides what other timelines have from this version on."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None or timeline != self._timeline:
            self.close()
            if self._place is None:
                raise TypeError("an observer observes where it was opened")
            folder = self._place.data / FOLDER / self._place.model / self.hook_id
            make: Any = SummaryWriter
            self._writer = make(str(folder), purge_step=version)
            self._timeline = timeline
        return self._writer
