"""How a model is kept on the disk: its level, its snapshots' interval, and the versions that can be restored."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Response
from pydantic import BaseModel, ConfigDict, Field

from ...coordinator.commits import DURABILITY
from ...coordinator.settings import LARGEST_WHOLE
from ...journal.durability import DurabilitySettings, read_durability
from ...models.events import OPERATOR
from ...models.model import Model
from ...remote.sender import Sender
from ..answers.dry_run import DryRun, would, would_restore
from ..answers.etags import IfMatch, require_known, tag
from ..depends import CatalogHere, ModelHere

router = APIRouter(tags=["durability"])


def _show(model: Model, sender: Sender | None) -> dict[str, Any]:
    journal = model.recorder.journal
    return {
        **model.durability.model_dump(mode="json"),
        "version": model.version,
        "durable_version": model.recorder.durable_version,
        "journal_bytes": 0 if journal is None else journal.file_bytes,
        "snapshots_store": None if sender is None else sender.describe(model),
    }


@router.get("/models/{m}/durability", summary="Show how the model is kept on the disk")
async def show_durability(model: ModelHere, catalog: CatalogHere, response: Response) -> dict[str, Any]:
    """The settings, and the newest version that no crash can undo.

    `snapshots_store` is where snapshots are sent if that is not the data folder: the newest one that was sent, and if it
    does not take them, why, since when, and when it is tried again.
    """
    tag(response, model, DURABILITY)
    return _show(model, catalog.sender)


@router.patch("/models/{m}/durability", summary="Change how the model is kept on the disk")
async def change_durability(
    model: ModelHere,
    catalog: CatalogHere,
    response: Response,
    settings: Annotated[
        dict[str, Any],
        Body(examples=[{"level": "durable"}, {"level": "everysec", "snapshot_every_s": 300.0, "keep": 3}]),
    ],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """A setting that is left out stays as it is. Another level holds once this has answered."""

    def wanted() -> DurabilitySettings:
        read = read_durability(settings, model.durability)
        require_known(if_match, model, DURABILITY)
        return read

    if dry_run:
        model.require_here()
        before = _show(model, catalog.sender)
        return would(before, {**before, **wanted().model_dump(mode="json")})
    await catalog.set_durability(model.name, wanted, OPERATOR)
    tag(response, model, DURABILITY)
    return _show(model, catalog.sender)


class RestoreVersion(BaseModel):
    """Which version to go back to."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]


@router.post("/models/{m}/restore", summary="Restore a version")
async def restore_version(
    model: ModelHere,
    wanted: Annotated[RestoreVersion, Body(examples=[{"version": 1200}])],
    catalog: CatalogHere,
    dry_run: DryRun = False,
) -> Any:
    """Brings back a version that a snapshot holds, or the journal behind one, on a new timeline.

    Everything but the worker table comes back, with the edits that were made before the version after it. Workers are
    told, and go on from there.
    """
    if dry_run:
        return would_restore(model, await catalog.restores.planned(model, wanted.version))
    version = await catalog.restore_version(model.name, wanted.version, OPERATOR)
    return {"timeline": model.timeline, "effective_version": version}
