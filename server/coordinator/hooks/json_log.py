"""The JSON log hook: writes one line per event at its point to the server's log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..settings import Positive, Settings
from .hook import Hook, Point


class JsonLogSettings(Settings):
    """How often to write."""

    every: Positive = Field(1, description="write each n-th event only")


class JsonLog(Hook):
    """Writes each event at its point to the server's log as one JSON object."""

    name: ClassVar[str] = "json_log"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset(Point)
    settings_type: ClassVar[type[Settings]] = JsonLogSettings
    settings: JsonLogSettings

    def __init__(self, hook_id: str, point: Point, settings: JsonLogSettings) -> None:
        super().__init__(hook_id, point, settings)
        self._seen = 0

    def observe(self, event: Mapping[str, Any]) -> str | None:
        """The event as a line of JSON, for every n-th event; None for the others."""
        self._seen += 1
        if self._seen % self.settings.every == 0:
            return json.dumps({"hook": self.hook_id, "point": self.point, **event})
        return None
