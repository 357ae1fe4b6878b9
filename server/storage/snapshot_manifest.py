"""The schema of a snapshot's manifest, and the layout that it describes.

`storage/snapshots.py` checks before that its bytes are the ones that were written. But a manifest with a good digest may
come from another build, or from another author. Its schema is checked on every reading. What its hooks, workers, policy
and gate keep has no schema here: `storage/saved_state.py` makes them, before a model takes anything over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pushstep.optim import RULES
from pushstep.proto.errors import PushstepError, SnapshotUnsupported
from pushstep.proto.types_pb2 import Manifest, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import MAX_DIMENSIONS, MAX_PARAMETERS, Layout

from ..coordinator.settings import problems

# A whole snapshot; a link, which is laid over the snapshot that it names. Builds that know no links refuse them.
FORMAT: Final = 1
LINK_FORMAT: Final = 2
EXTRAS: Final = "extras.safetensors"
ID: Final = re.compile(r"t([0-9]+)-v([0-9]+)-e([0-9]+)-([0-9]+)")
PROBLEMS_SHOWN: Final = 3
# A start reads all links of a chain, and each may be damaged.
MOST_LINKS: Final = 16

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[int, Field(ge=0, lt=1 << 64)]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class Saved(BaseModel):
    """Base of what is read back. Types are strict. Unknown fields are another build's, and are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class SavedParameter(Saved):
    """A parameter, as the layout needs it."""

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    shape: Annotated[list[Count], Field(max_length=MAX_DIMENSIONS)]
    dtype: Dtype
    group: Count
    aliases: list[str]
    # of a piece of a parameter that lies in several ranks
    whole_rows: Count = 0
    first_row: Count = 0


class SavedGroup(Saved):
    """A param group with all its hyperparameters."""

    rule: str
    optimizer: Annotated[int, Field(ge=0, lt=1 << 32)]
    values: dict[str, bool | float]
    pinned: list[str]

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.rule not in RULES:
            raise ValueError(f"this build has no update rule {self.rule[:50]!r}; it has {', '.join(RULES)}")
        defaults = RULES[self.rule].defaults
        kinds = {name: isinstance(value, bool) for name, value in self.values.items()}
        if kinds != {name: isinstance(value, bool) for name, value in defaults.items()}:
            raise ValueError(f"a group of rule {self.rule!r} has the values {', '.join(defaults)}")
        return self


class SavedFile(Saved):
    """A file of the snapshot: the arena and the elements that it holds, unless it holds the extras."""

    file: Annotated[str, Field(pattern=r"^((arena|rows)-[0-9]{4,}|extras)\.safetensors$")]
    bytes: Count
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    # in place of it, in older snapshots
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    arena: Count | None = None
    group: Count | None = None
    start: Count | None = None
    stop: Count | None = None

    @model_validator(mode="after")
    def _has_a_digest(self) -> Self:
        if self.xxh3_128 is None and self.sha256 is None:
            raise ValueError("neither xxh3_128 nor sha256")
        return self


class SavedBase(Saved):
    """The snapshot under a link, and how long and large the chain of links is with this one."""

    id: Annotated[str, Field(pattern=f"^{ID.pattern}$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    links: Annotated[int, Field(ge=1, le=MOST_LINKS)]
    bytes: Count


class SavedHook(Saved):
    """An installed hook. Only the hook itself checks its settings and state."""

    id: str
    name: str
    point: str
    settings: dict[str, Any]
    state: dict[str, Any]


class SavedVerdict(Saved):
    """The outcome of a push."""

    digest: Number
    receipt: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
    error: Annotated[list[Any], Field(min_length=3, max_length=3)] | None


class SavedWorker(Saved):
    """A row of the worker table."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    epoch: Count
    sequence: Number
    state: str
    joined: Count
    outcomes: dict[str, Count]
    duplicates: Count
    refused_in_row: Count
    quarantined: bool
    quarantined_by_hand: bool = False
    attempts: list[Number] = []
    forgotten: Annotated[list[Number], Field(min_length=2, max_length=2)] = [0, 0]
    since: Count = 0
    worker_state: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
    verdicts: list[SavedVerdict]


class SnapshotManifest(Saved):
    """The whole manifest."""

    format: Literal[1, 2]
    id: str
    automatic: bool
    created: float
    timeline: Count
    version: Count
    edit: Count
    lineage: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    steps: list[Number]
    parameters: Annotated[list[SavedParameter], Field(min_length=1, max_length=MAX_PARAMETERS)]
    groups: Annotated[list[SavedGroup], Field(min_length=1)]
    files: Annotated[list[SavedFile], Field(min_length=1)]
    hooks: list[SavedHook]
    workers: list[SavedWorker]
    forgotten_epoch: Count = 0
    policy: dict[str, Any]
    gate: dict[str, Any]
    journal: Number = 0
    first_epoch: Count = 0
    durability: dict[str, Any] | None = None
    revisions: dict[str, Count] = {}
    base: SavedBase | None = None
    # by slot: the parameters of which a link holds the changed rows
    tables: list[Count] = []

    @field_validator("files")
    @classmethod
    def _in_order(cls, files: list[SavedFile]) -> list[SavedFile]:
        of_arenas = [file for file in files if file.file != EXTRAS]
        arenas = [file for file in of_arenas if not is_rows(file.file)]
        rows = [file for file in of_arenas if is_rows(file.file)]
        names = [arena_file(index) for index in range(len(arenas))]
        names += [rows_file(file.arena or 0) for file in rows]
        if [file.file for file in files] not in (names, [*names, EXTRAS]):
            raise ValueError("not the arenas' files, each once and in order, and then the extras'")
        if [file.arena for file in arenas] != list(range(len(arenas))):
            raise ValueError("a file is of another arena than its name says")
        if len({file.file for file in rows}) != len(rows) or any(file.arena is None for file in rows):
            raise ValueError("two files hold the rows of one arena")
        return files

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.format == LINK_FORMAT) != (self.base is not None):
            raise ValueError("a link has a base, and a whole snapshot has none")
        if self.base is None and (self.tables or any(is_rows(file.file) for file in self.files)):
            raise ValueError("a whole snapshot holds no rows of tables")
        if self.tables and (
            max(self.tables) >= len(self.parameters) or len(set(self.tables)) != len(self.tables)
        ):
            raise ValueError("its tables are not parameters of it")
        if not self.id.startswith(f"t{self.timeline}-v{self.version}-e{self.edit}-"):
            raise ValueError("the id is not that of its timeline, version and edit")
        if len(self.steps) != len(self.parameters):
            raise ValueError(f"{len(self.steps)} step counts for {len(self.parameters)} parameters")
        return self


def arena_file(index: int) -> str:
    """The name of an arena's file."""
    return f"arena-{index:04d}.safetensors"


def rows_file(index: int) -> str:
    """The name of the file with rows of an arena's tables."""
    return f"rows-{index:04d}.safetensors"


def is_rows(name: str) -> bool:
    """True for the name of a file with rows."""
    return name.startswith("rows-")


def checked(snapshot: str, manifest: Mapping[str, Any]) -> None:
    """SnapshotUnsupported unless a manifest with a good digest has this build's format and schema."""
    if manifest.get("format") not in (FORMAT, LINK_FORMAT):
        found = str(manifest.get("format"))[:20]
        known = f"{FORMAT} or {LINK_FORMAT}"
        raise SnapshotUnsupported(snapshot=snapshot, problem=f"it is of format {found}, not {known}")
    try:
        SnapshotManifest.model_validate(manifest)
    except ValidationError as error:
        raise SnapshotUnsupported(snapshot=snapshot, problem=f"manifest: {in_words(error)}") from error


def in_words(error: ValidationError) -> str:
    """The first problems that a schema has found, as text."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return problems(found, whole="all of it", most=PROBLEMS_SHOWN)


def layout_of(snapshot: str, manifest: Mapping[str, Any]) -> Layout:
    """The layout that a checked manifest describes.

    SnapshotUnsupported if its files do not hold that layout's arenas.
    """
    message = Manifest(
        groups=[ParamGroup(rule=group["rule"], optimizer=group["optimizer"]) for group in manifest["groups"]]
    )
    for entry in manifest["parameters"]:
        message.parameters.add(
            name=entry["name"],
            shape=entry["shape"],
            dtype=dtypes.WIRE[dtypes.BY_NAME[entry["dtype"]]],
            group=min(entry["group"], len(manifest["groups"])),
            aliases=entry["aliases"],
            whole_rows=entry.get("whole_rows", 0),
            first_row=entry.get("first_row", 0),
        )
    try:
        layout = Layout(message)
    except PushstepError as error:
        raise SnapshotUnsupported(snapshot=snapshot, problem=error.message) from error
    held = [
        (file["group"], file["start"], file["stop"])
        for file in manifest["files"]
        if file["file"] != EXTRAS and not is_rows(file["file"])
    ]
    if held != [(arena.group, 0, arena.elements) for arena in layout.arenas]:
        raise SnapshotUnsupported(
            snapshot=snapshot, problem="its files do not hold the arenas of its parameters"
        )
    return layout


def parameters_of(layout: Layout) -> list[dict[str, Any]]:
    """A layout's parameters, as a manifest lists them."""
    return [
        {
            "name": slot.name,
            "shape": list(slot.shape),
            "dtype": dtypes.NAMES[slot.dtype],
            "group": slot.group,
            "aliases": list(slot.aliases),
            **({"whole_rows": slot.whole_rows, "first_row": slot.first_row} if slot.whole_rows else {}),
        }
        for slot in layout.slots
    ]
