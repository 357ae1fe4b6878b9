"""The JSON log: one line per event at its point, in the server's log."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..settings import Positive, Settings
from .hook import Hook, Point

log = logging.getLogger("pushstep.hooks.json_log")


class JsonLogSettings(Settings):
    """How often to write."""

    every: Positive = Field(1, description="write each n-th event only")


class JsonLog(Hook):
    """Writes what happened at its point as one JSON object."""

    name: ClassVar[str] = "json_log"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset(Point)
    settings_type: ClassVar[type[Settings]] = JsonLogSettings

    def __init__(self, hook_id: str, point: Point, settings: Settings) -> None:
        super().__init__(hook_id, point, settings)
        self._seen = 0

    def observe(self, event: Mapping[str, Any]) -> None:
        """Write the line."""
        self._seen += 1
        if isinstance(self.settings, JsonLogSettings) and self._seen % self.settings.every == 0:
            log.info("%s", json.dumps({"hook": self.hook_id, "point": self.point, **event}))
