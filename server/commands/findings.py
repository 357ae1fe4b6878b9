"""What a data folder holds of a model, all of it verified, and what a start would make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pushstep.proto.errors import (
    JournalDamaged,
    PushstepError,
    SnapshotDamaged,
    SnapshotsAway,
    SnapshotUnsupported,
)

from ..journal.chain import journal_files
from ..journal.examination import FileFinding, examine
from ..journal.repair import Repair, repair_of
from ..models.catalog import Catalog
from ..models.saved_models import SavedModels, not_loaded
from ..storage.model_folder import IdentityFile, ModelFolder
from ..storage.saved_state import saved_state
from .progress import Told, untold


@dataclass(slots=True)
class ModelFindings:
    """One model's."""

    name: str
    identity: IdentityFile | None = None
    # why the identity, or the whole folder, cannot be read
    problem: str = ""
    # by snapshot, newest first: id, state ("ok", "damaged", "unsupported"), and what is known of it
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    journal: list[FileFinding] = field(default_factory=list)
    # what a start continues from: timeline, version, snapshot; or why it would refuse the model
    start: dict[str, Any] | None = None
    # of the journal, if damage to it keeps the model from being loaded
    repair: Repair | None = None

    @property
    def is_well(self) -> bool:
        """True if nothing of it is damaged, and a start would load it."""
        whole = all(entry["state"] == "ok" for entry in self.snapshots)
        whole = whole and not any(found.problem for found in self.journal)
        return whole and not self.problem and "refused" not in (self.start or {})

    def dump(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "ok": self.is_well,
            "identity": _identity(self.identity, self.problem),
            "snapshots": self.snapshots,
            "journal": [_file(found) for found in self.journal],
            "start": self.start,
        }


def _identity(identity: IdentityFile | None, problem: str) -> dict[str, Any] | None:
    if identity is None:
        return {"damaged": problem} if problem else None
    return {
        "uid": identity.uid.hex(),
        "timeline": identity.timeline,
        "clean": identity.clean_version is not None,
        "version": identity.clean_version,
    }


def state_of(found: FileFinding) -> str:
    """The state of a journal's file, in a word."""
    return "damaged" if found.problem else "torn" if found.torn_bytes else "ok"


def _file(found: FileFinding) -> dict[str, Any]:
    known = found.begins_at is not None and found.ends_at is not None
    entry: dict[str, Any] = {
        "file": found.path.name,
        "state": state_of(found),
        "bytes": found.size_bytes,
        "first": found.first,
        "last": found.last,
        "versions": [found.begins_at, found.ends_at] if known else None,
    }
    if found.problem:
        entry |= {"record": found.record, "problem": found.problem}
    if found.torn_bytes:
        entry["torn_bytes"] = found.torn_bytes
    return entry


def steps_of(catalog: Catalog, name: str) -> int:
    """How many things `findings_of` tells of; 1 of a folder that cannot be read, of which it says why."""
    folder = catalog.folder(name)
    try:
        return len(folder.snapshots.ids()) + len(journal_files(folder.journal, name)) + 1
    except (PushstepError, OSError):
        return 1


async def findings_of(catalog: Catalog, name: str, told: Told = untold) -> ModelFindings:
    """Verify everything of one model, and load it as a start would. Writes nothing. `told` hears what is verified."""
    found, folder = ModelFindings(name), catalog.folder(name)
    try:
        for snapshot in folder.snapshots.ids():
            told(f"{name}: {snapshot}")
            found.snapshots.append(_snapshot(folder, snapshot))
        found.identity = folder.read_identity(bool(found.snapshots))
        found.journal = examine(folder.journal, found.identity.uid if found.identity else None, begun=told)
    except SnapshotsAway:  # nothing can be said
        raise
    except (PushstepError, OSError) as error:
        found.problem = not_loaded(name, error).fields["problem"]
    told(f"{name}: a start")
    refused = await _start(catalog, found)
    base = None if found.identity is None else _base(found, found.identity)
    if refused is not None and found.identity is not None and base is not None:
        if isinstance(refused, JournalDamaged) and not any(file.problem for file in found.journal):
            found.journal = examine(folder.journal, found.identity.uid, refused)
        found.repair = repair_of(found.journal, base["journal"])
    return found


def _snapshot(folder: ModelFolder, snapshot: str) -> dict[str, Any]:
    try:
        manifest, copy = folder.snapshots.read(snapshot)
        saved_state(manifest, copy, folder.name)
        based_on = [under["id"] for under in folder.snapshots.chain(snapshot)[:-1]]
    except SnapshotDamaged as error:
        return {"id": snapshot, "state": "damaged", "problem": error.fields["problem"]}
    except SnapshotUnsupported as error:
        return {"id": snapshot, "state": "unsupported", "problem": error.fields["problem"]}
    return {
        "id": snapshot,
        "state": "ok",
        "automatic": manifest["automatic"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "timeline": copy.timeline,
        "version": copy.version,
        "journal": int(manifest.get("journal", 0)),
        # a link is what has changed since these, the whole one first; all of them were verified with it
        "based_on": based_on,
    }


async def _start(catalog: Catalog, found: ModelFindings) -> Exception | None:
    """Load it as a start does. Returns what keeps a start from that."""
    try:
        brought = await SavedModels(catalog).bring_back(found.name)
    except Exception as error:  # noqa: BLE001 - whatever keeps a start from loading it
        found.start = {"refused": not_loaded(found.name, error).fields["problem"]}
        return error
    if brought is not None:
        model, recovered = brought
        await model.close()
        found.start = {
            "timeline": model.timeline,
            "version": model.version,
            "snapshot": recovered.state.snapshot,
            # False: what was acknowledged may be missing, and workers are told
            "proven": model.timeline == recovered.identity.timeline,
        }
    return None


def _base(found: ModelFindings, identity: IdentityFile) -> dict[str, Any] | None:
    """The snapshot that a start replays the journal over."""
    return next(
        (
            entry
            for entry in found.snapshots
            if entry["state"] == "ok" and identity.made_of(entry["timeline"], entry["version"])
        ),
        None,
    )


def mend(catalog: Catalog, found: ModelFindings) -> None:
    """Run the repair of a model's journal. StorageFailed, DiskFull."""
    repair, identity = found.repair, found.identity
    base = None if identity is None else _base(found, identity)
    if repair is None or identity is None or base is None:
        return
    if repair.loses:
        # first: a start that comes after a repair that broke off must not take what is left for all there was
        ends_at = repair.ends_at or (base["timeline"], base["version"])
        catalog.folder(found.name).write_identity(identity.continued_from(*ends_at))
    repair.run()
