"""Other numbers of ranks: what a job of N ranks has saved in order is cut anew for M, bit for bit, before anything is loaded.

Rank 0 does it for all, so all folders have to be within its reach. New parts are written beside the old ones, under hidden
names. When all are on the disk, a small file says so; then the folders are renamed. A start that finds that file finishes
the renaming. One that does not begins anew, from the old parts, which are whole until then.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from pushstep.proto.errors import ModelNotLoaded, PushstepError
from pushstep.proto.training_pb2 import Shard
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.names import is_name
from pushstep.proto.wire.shards import Part, Piece, cut

from ..arenas.arenas_copy import ArenasCopy
from ..arenas.extras import Extras
from ..arenas.rules import rule_of
from ..parts.shard import ModelShard
from ..parts.whole_file import NAME, read_whole, write_whole
from ..process.folder_lock import lock_folder
from ..storage import files
from ..storage.model_folder import IdentityFile, ModelFolder

log = logging.getLogger("pushstep.ranks")
PLAN: Final = "resharding.json"
NEW: Final = ".resharding-"
OLD: Final = ".resharded-"
# What a snapshot says beside its tensors.
FACTS: Final = (
    "model", "uid", "timeline", "version", "edit", "revisions", "policy", "gate", "groups", "hooks", "forgotten_epoch",
    "first_epoch", "durability",
)  # fmt: skip


def places(root: Path, world: int) -> list[Path]:
    """The data folders of so many ranks."""
    return [root] if world == 1 else [root / f"rank-{rank}" for rank in range(world)]


def reshard(root: Path, world: int) -> None:
    """Have every model in a data folder lie in so many ranks. It blocks. ModelNotLoaded if one cannot be cut anew."""
    _finish(root)
    lying = list(_lying(root))
    for name, before in lying:
        if [other for known, other in lying if known == name] != [before]:
            raise ModelNotLoaded(
                model=name, problem=f"it lies in {root} twice: as one server's, and in ranks"
            )
    moving = [(name, before) for name, before in lying if before != world]
    if not moving:
        return
    with ExitStack() as locks:
        for place in {place for _, before in moving for place in places(root, before)} - set(
            places(root, world)
        ):
            locks.callback(os.close, lock_folder(place))
        for name, before in moving:
            log.info("model %s: from %d to %d ranks", name, before, world, extra={"model": name})
            _Resharding(root, name, before, world).write()
            plan = json.dumps({"model": name, "from": before, "to": world})
            files.write_durably(root / PLAN, plan, PLAN)
            _finish(root)


def _lying(root: Path) -> Iterator[tuple[str, int]]:
    """Each model, and in how many ranks it lies."""
    for place in (root, root / "rank-0"):
        models = place / "models"
        for folder in sorted(models.iterdir()) if models.is_dir() else ():
            if is_name(folder.name) and folder.is_dir():
                yield folder.name, _world_of(folder)


def _world_of(folder: Path) -> int:
    """How many ranks a part's file names: its first number, since the manifest behind it may be long."""
    try:
        with (folder / NAME).open() as file:
            found = re.match(r'\{"world": (\d+)', file.read(64))
    except FileNotFoundError:
        return 1
    if found is None:
        raise ModelNotLoaded(model=folder.name, problem=f"{NAME} does not say in how many ranks it lies")
    return int(found[1])


def _finish(root: Path) -> None:
    """Put parts that are written in the place of the old ones."""
    try:
        plan = json.loads(files.read_small(root / PLAN, 1 << 16))
    except FileNotFoundError:
        return
    name, new = plan["model"], places(root, plan["to"])
    for place in {*places(root, plan["from"]), *new}:
        models = place / "models"
        made, old, aside = models / f"{NEW}{name}", models / name, models / f"{OLD}{name}"
        if old.exists() and (made.exists() or place not in new):
            os.replace(old, aside)
        if made.exists():
            os.replace(made, old)
        if models.is_dir():
            files.fsync(models)
    for place in places(root, plan["from"]):
        aside = place / "models" / f"{OLD}{name}"
        if aside.exists():
            files.remove(aside)
    (root / PLAN).unlink()
    files.fsync(root)


class _Resharding:
    """One model on its way from N ranks to M."""

    def __init__(self, root: Path, name: str, before: int, after: int) -> None:
        self._name = name
        self._old = [ModelFolder(place / "models" / name) for place in places(root, before)]
        self._new = [place / "models" / f"{NEW}{name}" for place in places(root, after)]
        self._manifest, first, self._identity = self._saved(0)
        self._at = first.timeline, first.version
        self._extras, self._lineage = first.extras, first.lineage
        whole = None if before == 1 else read_whole(self._old[0].path)
        self._whole: Layout = first.layout if whole is None else whole.whole
        self._parts = cut(self._whole, before)

    def _saved(self, rank: int) -> tuple[dict[str, Any], ArenasCopy, IdentityFile]:
        """What a rank has saved last. ModelNotLoaded unless that is all that it ever had."""
        folder = self._old[rank]
        identity = folder.read_identity(is_needed=True)
        if identity is None:
            raise self._refused(rank, "it has no identity")
        found = folder.snapshots.newest(identity.made_of)
        if found is None or (found[1].timeline, found[1].version) != (
            identity.timeline,
            identity.clean_version,
        ):
            raise self._refused(rank, "it was not stopped in order: start it so once, and stop it")
        if rank and (identity.uid, identity.clean_version) != (
            self._identity.uid,
            self._identity.clean_version,
        ):
            raise self._refused(rank, "it has another version than rank 0")
        return *found, identity

    def _refused(self, rank: int, problem: str) -> ModelNotLoaded:
        problem = f"rank {rank} of {len(self._old)}: {problem}; its number of ranks cannot be changed"
        return ModelNotLoaded(model=self._name, problem=problem)

    def write(self) -> None:
        """Write the new parts. ModelNotLoaded, StorageFailed, DiskFull; then none is left, and it can be begun anew."""
        try:
            self._write()
        except PushstepError:
            for path in self._new:
                files.sweep(path.parent, path.name)
            raise

    def _write(self) -> None:
        count = len(self._new)
        addresses = [Shard(rank=rank) for rank in range(count)]
        for rank, (part, path) in enumerate(zip(cut(self._whole, count), self._new, strict=True)):
            if path.exists():
                files.remove(path)
            if part is None:
                continue
            folder, copy = ModelFolder(path), self._made(part, with_extras=rank == 0)
            facts: dict[str, Any] = {key: self._manifest[key] for key in FACTS if key in self._manifest}
            facts |= {"workers": self._manifest["workers"] if rank == 0 else [], "journal": 0}
            folder.write_identity(self._identity)
            if count > 1:
                write_whole(path, ModelShard(self._whole, rank, addresses))
            folder.snapshots.write(facts, copy.captured(), automatic=True)

    def _made(self, part: Part, *, with_extras: bool) -> ArenasCopy:
        layout = part.layout
        averages: dict[str, dict[int, torch.Tensor]] = {}
        made = ArenasCopy(
            layout,
            *self._at,
            [torch.zeros(arena.elements, dtype=arena.dtype, device="cpu") for arena in layout.arenas],
            [
                {
                    name: _state(arena.elements, arena.dtype)
                    for name in rule_of(layout, arena.group).state_names
                }
                for arena in layout.arenas
            ],
            [0] * len(layout.slots),
            self._extras if with_extras else Extras(),
            self._lineage,
            averages,
        )
        for rank, old in enumerate(self._parts):
            # a read verifies the whole old part
            if old is not None and (shared := _shared(part, old)):
                _fill(made, averages, shared, self._saved(rank)[1])
        return made


def _state(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(elements, dtype=dtypes.state_dtype(dtype), device="cpu")


def _shared(part: Part, old: Part) -> list[tuple[Piece, Piece]]:
    """The pieces of a new part of which an old one has elements, each with the old one's; and those without elements."""
    found = []
    for piece in part.pieces:
        source = old.by_whole.get(piece.whole)
        if source is not None and (
            max(piece.start, source.start) < min(piece.stop, source.stop) or piece.start == piece.stop
        ):
            found.append((piece, source))
    return found


def _fill(
    made: ArenasCopy,
    averages: dict[str, dict[int, torch.Tensor]],
    shared: Sequence[tuple[Piece, Piece]],
    copy: ArenasCopy,
) -> None:
    """Copy what an old part has of a new one."""
    for piece, source in shared:
        made.steps[piece.index] = int(copy.steps[source.index])
        start, stop = max(piece.start, source.start), min(piece.stop, source.stop)
        if start == stop:
            continue
        here, there = made.layout.slots[piece.index], copy.layout.slots[source.index]
        to = slice(here.start + start - piece.start, here.start + stop - piece.start)
        of = slice(there.start + start - source.start, there.start + stop - source.start)
        made.parameters[here.arena][to] = copy.parameters[there.arena][of]
        for name, flat in made.states[here.arena].items():
            flat[to] = copy.states[there.arena][name][of]
        for hook, kept in copy.averages.items():
            if there.arena in kept:
                arena = made.layout.arenas[here.arena]
                fresh = averages.setdefault(hook, {})
                if here.arena not in fresh:
                    fresh[here.arena] = _state(arena.elements, arena.dtype)
                fresh[here.arena][to] = kept[there.arena][of]
