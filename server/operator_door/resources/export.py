"""Checkpoints and the state_dict of a model's current version."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from pushstep.proto.errors import VersionMoved

from ...models.copies import copy_of
from ...models.model import Model
from ...process.threads import READS
from ...storage.checkpoints import Checkpoint, check_format, describe_state, write
from ..depends import CatalogHere, CopiesHere, DownloadsHere, ModelHere
from ..download import Download

router = APIRouter(tags=["export"])
SUFFIX = {"safetensors": "safetensors", "torch": "pt"}


@router.get("/models/{m}/export", summary="Download a checkpoint", response_class=StreamingResponse)
async def export(
    request: Request,
    model: ModelHere,
    catalog: CatalogHere,
    copies: CopiesHere,
    downloads: DownloadsHere,
    format: Annotated[str, Query(description="safetensors or torch")] = "safetensors",
    version: Annotated[
        int | None,
        Query(ge=0, description="only if the model is at this version; such a download may be gone on with"),
    ] = None,
    timeline: Annotated[
        int | None,
        Query(
            ge=1,
            description="only if the model is on this timeline; needed beside `version` from the second on",
        ),
    ] = None,
) -> Download:
    """`safetensors`: parameters by name. `torch`: {"model", "optimizer"}, for torch.load(weights_only=True).

    A Range is answered with a part in two cases: the request names the version, and nothing else was ever sent for the
    same request; or If-Range names the ETag of the content. Otherwise the answer is the whole.
    """
    check_format(format)
    asked = _Asked(model, format, version, timeline)
    asked.require(model.timeline, model.version)

    async def written() -> Checkpoint:
        async with copy_of(copies, model) as (facts, copy):
            return await READS.run(write, facts, copy, format, catalog.config.data)

    async with AsyncExitStack() as held:
        checkpoint = await held.enter_async_context(downloads.shared((model.content, format), written))
        asked.require(checkpoint.timeline, checkpoint.version)
        is_one = asked.is_one(checkpoint)
        fixed = is_one and downloads.pins.note(asked.name, checkpoint.etag) == checkpoint.etag
        name = f"{model.name}-v{checkpoint.version}"
        answer = download(request, checkpoint, format, name, is_fixed=fixed)
        if is_one:
            answer.headers["Accept-Ranges"] = "bytes"
        answer.held = held.pop_all()
        return answer


class _Asked:
    """The version and timeline that a request names, if it names them."""

    def __init__(self, model: Model, form: str, version: int | None, timeline: int | None) -> None:
        self._model = model
        self._version = version
        self._timeline = timeline
        self.name = (model.name, form, version, timeline)

    def require(self, timeline: int, version: int) -> None:
        """VersionMoved if the request names another timeline or version than these."""
        if self._version in (None, version) and self._timeline in (None, timeline):
            return
        wanted = [
            f"{what} {number}"
            for what, number in (("version", self._version), ("timeline", self._timeline))
            if number is not None
        ]
        raise VersionMoved(
            model=self._model.name, version=version, timeline=timeline, asked=" of ".join(wanted)
        )

    def is_one(self, found: Checkpoint) -> bool:
        """True if no other process or timeline can have sent something else for the same request."""
        pinned = self._version is not None and (self._timeline is not None or found.timeline == 1)
        return pinned and (found.timeline, found.version) != self._model.begun_at


@router.get("/models/{m}/state-dict", summary="Show the state_dict")
async def show_state_dict(model: ModelHere, copies: CopiesHere) -> dict[str, Any]:
    """The state_dict in torch's shape, with each state's shape and norm in place of its elements."""
    async with copy_of(copies, model) as (facts, copy):
        optimizers = await READS.run(describe_state, facts, copy)
        return {"version": copy.version, "timeline": copy.timeline, "optimizers": optimizers}


def download(request: Request, checkpoint: Checkpoint, form: str, name: str, *, is_fixed: bool) -> Download:
    """A checkpoint as an answer. `is_fixed`: the same request can never get another content."""
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.{SUFFIX[form]}"',
        "X-Pushstep-Version": str(checkpoint.version),
        "X-Pushstep-Timeline": str(checkpoint.timeline),
    }
    return Download(request, checkpoint, headers, is_fixed=is_fixed)
