"""Checkpoints and the state_dict of a model's current version, and files that replace it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from pushstep.proto.errors import VersionMoved

from ...imports.imports import Imports, ImportSettings
from ...models.copies import copy_of
from ...models.events import OPERATOR
from ...models.model import Model
from ...process.threads import READS
from ...storage.checkpoints import Checkpoint, Content, describe_state, write
from ..answers.download import Download
from ..answers.dry_run import DryRun, would
from ..depends import CatalogHere, CopiesHere, DownloadsHere, ModelHere, received
from ..header_fields import digest_header, wants_digest
from ..openapi import FILE_BODY
from ..queries import Flag

router = APIRouter(tags=["export"])
SUFFIX = {"safetensors": "safetensors", "torch": "pt"}
Format = Annotated[str, Query(description="safetensors or torch")]
State = Annotated[Flag, Query(description="of a safetensors file: with the optimizer's state")]
Average = Annotated[
    str,
    Query(max_length=300, description="id of an `ema` hook: its averages in place of the parameters"),
]


@router.get("/models/{m}/export", summary="Download a checkpoint", response_class=StreamingResponse)
async def export(
    request: Request,
    model: ModelHere,
    catalog: CatalogHere,
    copies: CopiesHere,
    downloads: DownloadsHere,
    format: Format = "safetensors",
    state: State = False,
    average: Average = "",
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

    A safetensors file has the param groups in its metadata (`pushstep.groups`), and with `state` also
    `optimizer.<state>.<parameter>` and `optimizer.step.<parameter>`: what POST /v1/models and PUT .../state-dict take.
    With `Want-Repr-Digest: sha-256=1` the answer has a `Repr-Digest`.

    A Range is answered with a part in two cases: the request names the version, and nothing else was ever sent for the
    same request; or If-Range names the ETag of the content. Otherwise the answer is the whole.
    """
    content = Content(format, state, average)
    asked = _Asked(model, content, version, timeline)
    asked.require(model.timeline, model.version)

    async def written() -> Checkpoint:
        async with copy_of(copies, model, catalog.config.data, content) as (facts, copy):
            return await READS.run(write, facts, copy, content, catalog.config.data)

    async with AsyncExitStack() as held:
        checkpoint = await held.enter_async_context(downloads.shared((model.content, content), written))
        asked.require(checkpoint.timeline, checkpoint.version)
        is_one = asked.is_one(checkpoint)
        fixed = is_one and downloads.pins.note(asked.name, checkpoint.etag) == checkpoint.etag
        name = f"{model.name}-v{checkpoint.version}"
        answer = await download(request, checkpoint, content, name, is_fixed=fixed)
        if is_one:
            answer.headers["Accept-Ranges"] = "bytes"
        answer.held = held.pop_all()
        return answer


class _Asked:
    """The version and timeline that a request names, if it names them."""

    def __init__(self, model: Model, content: Content, version: int | None, timeline: int | None) -> None:
        self._model = model
        self._version = version
        self._timeline = timeline
        self.name = (model.name, content, version, timeline)

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
async def show_state_dict(model: ModelHere, catalog: CatalogHere, copies: CopiesHere) -> dict[str, Any]:
    """The state_dict in torch's shape, with each state's shape and norm in place of its elements."""
    async with copy_of(copies, model, catalog.config.data) as (facts, copy):
        optimizers = await READS.run(describe_state, facts, copy)
        return {
            "version": copy.version,
            "timeline": copy.timeline,
            "optimizers": optimizers,
            "hooks": facts["hooks"],
        }


@router.put("/models/{m}/state-dict", summary="Import values from a file", openapi_extra=FILE_BODY)
async def import_state_dict(
    request: Request,
    model: ModelHere,
    catalog: CatalogHere,
    partial: Annotated[Flag, Query(description="the file need not have every parameter")] = False,
    weights_only: Annotated[Flag, Query(description="leave out the optimizer's state in the file")] = False,
    keep_state: Annotated[
        Flag, Query(description="keep the optimizer's state, which otherwise begins anew with new values")
    ] = False,
    dry_run: DryRun = False,
) -> Any:
    """The body is a safetensors file such as an export: parameters by name, and perhaps the optimizer's state.

    State is `optimizer.<state>.<parameter>`, such as `optimizer.sum.weight`, beside `optimizer.step.<parameter>`, one
    int64; a file with any of it has all of it for each parameter that it holds. A buffer that the model has may be
    there, too. Every name, shape and dtype must be the model's, values must be finite, and state not negative: all is
    checked before anything is replaced. The model goes on from there on a new timeline, as after a restore; its workers
    are told. With a `Repr-Digest` (sha-256) the body is verified.
    """
    file = await received(request, catalog, model.name)
    settings = ImportSettings(partial, weights_only, keep_state)
    if dry_run:
        before = {"timeline": model.timeline, "version": model.version}
        return would(before, await Imports(catalog).plan_replace(model, file, settings))
    return await Imports(catalog).replace(model, file, settings, OPERATOR)


async def download(
    request: Request, checkpoint: Checkpoint, content: Content, name: str, *, is_fixed: bool
) -> Download:
    """A checkpoint as an answer. `is_fixed`: the same request can never get another content."""
    headers = {
        "Content-Disposition": f'attachment; filename="{name}.{SUFFIX[content.format]}"',
        "X-Pushstep-Version": str(checkpoint.version),
        "X-Pushstep-Timeline": str(checkpoint.timeline),
    }
    if wants_digest(request.headers.get("want-repr-digest", "")):
        headers["Repr-Digest"] = digest_header(await READS.run(checkpoint.sha256))
    return Download(request, checkpoint, headers, is_fixed=is_fixed)
