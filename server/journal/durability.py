"""How a model is kept on the disk: its level, how often a snapshot is taken, and how many are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import Field, field_validator

from ..coordinator.settings import Seconds, Settings, read
from .journal import Level

MOST_KEPT: Final = 1000


class DurabilitySettings(Settings):
    """The settings of one model."""

    level: Level = Field(
        default=Level.APPLIED,
        description="what a push's answer promises: it is applied; or it is on the disk within a second; or it is on the disk",
    )
    snapshot_every_s: Seconds = Field(
        default=60.0, description="a snapshot is taken so often while something changes"
    )
    keep: Annotated[int, Field(ge=1, le=MOST_KEPT)] = Field(
        default=2,
        description="automatic snapshots that are kept, the newest ones; the journal reaches back to the oldest of them",
    )

    @field_validator("level", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return Level(value) if isinstance(value, str) and value in list(Level) else value


def read_durability(changes: Mapping[str, Any], current: DurabilitySettings) -> DurabilitySettings:
    """`current` with `changes` applied. InvalidSettings if the result is not valid."""
    return read(DurabilitySettings, {**current.model_dump(mode="json"), **changes}, "durability")
