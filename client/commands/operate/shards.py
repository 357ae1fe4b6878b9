"""`pushstep shards`: the ranks of a job, and which part of each model lies in which of them."""

from __future__ import annotations

from typing import Any

from ..door import Door, Table, operates


@operates
def shards(door: Door) -> None:
    """Show the ranks of the server's job: what each holds, how far it has come, and its share of each model."""
    shown = door.all_of("/v1/shards", "models")
    ranks = Table(
        ("rank", "state", "address", "bytes", "limit", "staging", "staged", "behind", "step_s", "journal_s"),
        [_rank(rank) for rank in shown["ranks"]],
    )
    models = Table(
        ("model", "version", "skew", "rank", "at version", "parameters", "elements", "bytes", "share"),
        [_part(model, part) for model in shown["models"] for part in model["shards"]],
    )
    world, ready = shown["world"], "ready" if shown["ready"] else "not ready"
    said = f"{world} {'rank' if world == 1 else 'ranks'}, {ready}, skew {shown['skew']:.6g}"
    door.show(shown, ranks, *([models] if shown["models"] else ()), said=[said])


def _rank(rank: dict[str, Any]) -> list[Any]:
    held, staging = rank["bytes"] or {}, rank["staging_bytes"] or {}
    seconds = rank["seconds"] or {}
    return [
        rank["rank"],
        rank["state"],
        rank["address"],
        held.get("held"),
        held.get("limit"),
        staging.get("held"),
        rank["pushes_staged"],
        rank["versions_behind"],
        _mean(seconds.get("step")),
        _mean(seconds.get("journal")),
    ]


def _part(model: dict[str, Any], part: dict[str, Any]) -> list[Any]:
    of_model = [model["name"], model["version"], model["skew"]]
    of_part = [part[name] for name in ("rank", "version", "parameters", "elements", "bytes", "share")]
    return of_model + of_part


def _mean(counted: dict[str, float] | None) -> float | None:
    """Seconds of each, since the start; None before the first."""
    return counted["sum"] / counted["count"] if counted and counted["count"] else None
