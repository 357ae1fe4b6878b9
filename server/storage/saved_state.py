"""A verified snapshot as what a model is made of, or takes over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pushstep.proto.errors import PushstepError, SnapshotUnsupported

from ..arenas.arenas_copy import ArenasCopy
from ..coordinator.gate import Gate
from ..coordinator.groups import ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.policies import catalogue as policies
from ..coordinator.policies.policy import PolicySettings
from ..coordinator.sessions import Sessions
from .chains import Base, base_of


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a snapshot holds. One model takes it over: its groups, hooks and gate are live objects.

    `workers` and `forgotten_epoch` are as `Sessions.parse` takes them. A restore takes over only receipts that are lost.
    """

    snapshot: str
    copy: ArenasCopy
    edit: int
    groups: ParamGroups
    hooks: HookChain
    gate: Gate
    policy: PolicySettings
    workers: Sequence[Mapping[str, Any]]
    forgotten_epoch: int
    # the last record of the journal before it, and how the model is kept; None in older snapshots
    journal: int
    # a new worker's epoch is above it
    first_epoch: int
    durability: Mapping[str, Any] | None
    # at which edit each resource was last changed; empty in older snapshots
    revisions: Mapping[str, int]
    # on which the next snapshot may be based; None for what is no snapshot as it lies on the disk
    base: Base | None
    # when it was written, as seconds since the epoch, and the bytes of its files
    created_s: float = 0.0
    files_bytes: int = 0


def saved_state(manifest: Mapping[str, Any], copy: ArenasCopy, model: str) -> SavedState:
    """The state in a verified snapshot. SnapshotUnsupported if this build cannot make a model of it."""
    workers, forgotten_epoch = manifest["workers"], manifest.get("forgotten_epoch", 0)
    try:
        groups = ParamGroups.parse(manifest["groups"])
        hooks = HookChain.parsed(manifest["hooks"], groups, model)
        gate = Gate.parsed(manifest["gate"])
        policy = policies.read(manifest["policy"])
        Sessions(1.0, 1, model).parse(workers, 0.0, forgotten_epoch)
    except PushstepError as error:
        raise SnapshotUnsupported(snapshot=manifest["id"], problem=error.message) from error
    except Exception as error:  # a manifest by another author may break any of them in any way
        raise SnapshotUnsupported(
            snapshot=manifest["id"], problem=f"its hooks, gate or workers ({type(error).__name__}: {error})"
        ) from error
    return SavedState(
        manifest["id"],
        copy,
        int(manifest["edit"]),
        groups,
        hooks,
        gate,
        policy,
        workers,
        forgotten_epoch,
        int(manifest.get("journal", 0)),
        int(manifest.get("first_epoch", 0)),
        manifest.get("durability"),
        manifest.get("revisions", {}),
        base_of(manifest, copy.layout),
        float(manifest.get("created", 0.0)),
        sum(int(file["bytes"]) for file in manifest.get("files", ())),
    )
