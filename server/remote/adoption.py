"""Brings models whose snapshots a store has into a data folder that lacks them: that folder's machine is gone.

The identity file is made of the newest snapshot's manifest. Restores and joins that came after that snapshot are unknown,
so timeline and epochs begin far above any that can have been used, and the workers are told what is lost.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

from pushstep.proto.wire.names import is_name

from ..storage.model_folder import IdentityFile, ModelFolder
from ..storage.snapshot_manifest import ID
from ..storage.snapshot_reader import LONGEST_MANIFEST_BYTES, MANIFEST
from ..storage.store import read_whole
from .bucket import Bucket
from .index import Index
from .object_store import MODELS, ObjectSource
from .remote import Remote

log = logging.getLogger("pushstep.remote")
# No more restores, and no more joins, can have come since a snapshot.
AHEAD: Final = 1 << 20


def adopt(remote: Remote, data: Path) -> None:
    """Make a folder for each model of the store that has none here. SnapshotsAway, StorageFailed."""
    remote.require_owned()
    newest: dict[str, tuple[float, dict[str, Any], list[str]]] = {}
    for place in remote.bucket.names(MODELS):
        found = _newest(remote.bucket, f"{MODELS}/{place}")
        if found is None:
            continue
        manifest, ids = found
        name, created = str(manifest["model"]), float(manifest["created"])
        # a place whose model was put aside has its name, too
        if is_name(name) and created > newest.get(name, (0.0,))[0]:
            newest[name] = created, manifest, ids
    for name, (_, manifest, ids) in newest.items():
        path = data / "models" / name
        if path.exists():
            continue
        # the index first: without an identity the folder is that of a creation that broke off
        path.mkdir(parents=True)
        Index(frozenset(ids)).write(path)
        ModelFolder(path).write_identity(_identity(manifest))
        log.warning(
            "model %s was found at %s: it goes on from its newest snapshot",
            name,
            remote.bucket.shown,
            extra={"model": name},
        )
    remote.adopted()


def _newest(bucket: Bucket, place: str) -> tuple[dict[str, Any], list[str]] | None:
    """The manifest of the newest snapshot that has one which can be read, and the ids of all that have one."""
    found = [match for name in bucket.names(place) if (match := ID.fullmatch(name))]
    found.sort(key=lambda match: tuple(map(int, match.groups())), reverse=True)
    newest: dict[str, Any] | None = None
    ids = []
    for match in found:
        key = f"{place}/{match.group()}/{MANIFEST}"
        try:
            bucket.size_of(key)
        except FileNotFoundError:
            continue
        ids.append(match.group())
        if newest is None:
            newest = _manifest(bucket, key)
    return None if newest is None else (newest, ids)


def _manifest(bucket: Bucket, key: str) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads(read_whole(ObjectSource(bucket, key), LONGEST_MANIFEST_BYTES))
        _identity(manifest)
        float(manifest["created"]), str(manifest["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read: %s", key, type(error).__name__)
        return None
    return manifest


def _identity(manifest: dict[str, Any]) -> IdentityFile:
    timeline = int(manifest["timeline"])
    epochs = [int(worker["epoch"]) for worker in manifest["workers"]]
    most = max([*epochs, int(manifest.get("forgotten_epoch", 0)), int(manifest.get("first_epoch", 0))])
    return IdentityFile(
        bytes.fromhex(manifest["uid"]), timeline + AHEAD, None, None, most + AHEAD, crashed=[timeline]
    )
