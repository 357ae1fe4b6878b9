"""Models: listed, made of a file, shown, deleted."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response

from pushstep.proto.errors import NotInRanks

from ...access.caller import may_use
from ...imports.imports import Imports
from ...models.events import OPERATOR
from ...models.model import NAMES_SHOWN, Model
from ...parts.shard import whole_of
from ...reports.shown import bytes_in_all
from ..answers.dry_run import DRY_RUN_ANSWER, DryRun, would
from ..answers.figures import figures
from ..answers.pages import Cursor, key_in, page_of
from ..depends import CatalogHere, ModelHere, declared_bytes, received
from ..numbers import finite, finite_values
from ..openapi import FILE_BODY
from ..queries import Index

router = APIRouter(tags=["models"])
MOST_SHOWN: Final = 100


def describe(model: Model) -> dict[str, Any]:
    """A model as JSON: its identity, size, policy and last step."""
    receipt = model.last_receipt
    pusher = None if receipt is None else model.sessions.workers.get(receipt.identity.worker)
    return {
        "name": model.name,
        "uid": model.uid.hex(),
        "timeline": model.timeline,
        "version": model.version,
        "edit": model.edit,
        "parameters": len(whole_of(model).slots),
        "elements": sum(arena.elements for arena in whole_of(model).arenas),
        "bytes": bytes_in_all(model),
        "groups": len(model.groups.list),
        "hooks": len(model.hooks.list),
        "policy": model.coordinator.policy.settings.model_dump(mode="json"),
        "nonfinite": model.coordinator.gate.nonfinite(model.hooks.nonfinite()),
        "workers_live": model.sessions.live_count(),
        "workers_quarantined": sum(worker.quarantined for worker in model.sessions.workers.values()),
        "parameters_nonfinite": list(model.nonfinite[:NAMES_SHOWN]),
        "failed": None if model.failed is None else model.failed.message,
        "last_step": None
        if receipt is None
        else {
            "version": receipt.version,
            "worker": receipt.identity.worker,
            "staleness": receipt.staleness,
            "gradient_norm": finite(receipt.gradient_norm),
            "clip_factor": finite(receipt.clip_factor),
            "metrics": {} if pusher is None else finite_values(pusher.metrics),
        },
    }


@router.get("/models", summary="List the models")
async def list_models(
    catalog: CatalogHere,
    limit: Annotated[Index, Query(ge=1, le=MOST_SHOWN)] = MOST_SHOWN,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """Every model of this server that the caller may use, by name, a page at a time.

    `not_loaded` lists those whose files could not be loaded when the server started, each with the reason.
    """
    behind = key_in(cursor, "models", str)
    names = sorted(name for name in catalog.models if (behind is None or name > behind) and may_use(name))
    shown, more = page_of(names, limit, "models", str)
    return {
        "models": [describe(catalog.models[name]) for name in shown],
        "next": more,
        "not_loaded": [
            {"name": name, "problem": error.fields["problem"]}
            for name, error in sorted(catalog.not_loaded.items())
            if may_use(name)
        ],
    }


@router.post(
    "/models",
    status_code=201,
    summary="Make a model of a file",
    openapi_extra=FILE_BODY,
    responses=DRY_RUN_ANSWER,
)
async def create_model(
    request: Request,
    catalog: CatalogHere,
    name: Annotated[str, Query(description="the model's name", max_length=100)],
    groups: Annotated[
        str | None, Query(description="param groups as JSON [default: the file's `pushstep.groups`]")
    ] = None,
    dry_run: DryRun = False,
) -> Any:
    """The body is a safetensors file, such as an export. The first worker that attaches takes the server's values.

    The param groups say which tensors are parameters; the others are kept as buffers. An export names its groups in its
    metadata. A group is `{"rule": "adagrad", "lr": 0.1, "params": [...]}`: names in the order that the workers' module
    has them (manifests must agree in it), each a text, or a list for a tied weight; or patterns such as `encoder.*`. A
    group without `params` has all of a floating type that no other names. Optimizer state as for PUT .../state-dict.
    """
    if catalog.ranks is not None:
        raise NotInRanks(model=name, ranks=catalog.ranks.world, what="a model made of a file")
    imports = Imports(catalog)
    imports.require_new(name, declared_bytes(request))
    file = await received(request, catalog, name)
    if dry_run:
        return would(None, await imports.plan_create(name, groups, file))
    return describe(await imports.create(name, groups, file, OPERATOR))


@router.get("/models/{m}", summary="Show a model")
async def show_model(model: ModelHere) -> dict[str, Any]:
    """One model. `figures` are what this process has counted: two looks give the rates between them.

    Each of `seconds` (of the rooms of a push) and `staleness` has the sum of all its values and their number.
    """
    return {**describe(model), "figures": figures(model)}


@router.delete(
    "/models/{m}", status_code=204, summary="Delete a model and its snapshots", responses=DRY_RUN_ANSWER
)
async def delete_model(m: str, catalog: CatalogHere, dry_run: DryRun = False) -> Response:
    """Deletes the model for good. Its workers are told `model_lost`.

    The files of a model that could not be loaded are not deleted: they are put aside in the data folder, under
    `.lost-` and its name, and the name is free again.
    """
    if dry_run:
        lost = catalog.not_loaded.get(m)
        gone = describe(catalog.get(m)) if lost is None else {"name": m, "problem": lost.fields["problem"]}
        return would(gone, None)
    await catalog.delete(m, OPERATOR)
    return Response(status_code=204)
