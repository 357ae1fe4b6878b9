"""The file that says of which whole model a folder's part is, and of how many ranks. It is written once, at the creation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToJson, Parse, ParseError

from pushstep.proto.errors import ModelNotLoaded, PushstepError
from pushstep.proto.shards_pb2 import RankedModel
from pushstep.proto.wire.layout import Layout

from ..storage import files
from .shard import ModelShard, Ranks

NAME: Final = "ranks.json"
LONGEST_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class WholeFile:
    """What it says."""

    world: int
    rank: int
    whole: Layout


def write_whole(folder: Path, shard: ModelShard) -> None:
    """Write it. StorageFailed."""
    name = f"models/{folder.name}/{NAME}"
    said = RankedModel(world=len(shard.parts), rank=shard.rank, manifest=shard.whole.manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.refusal(name, error, folder.parent) from error
    files.write_durably(folder / NAME, MessageToJson(said, indent=None), name)


def read_whole(folder: Path) -> WholeFile | None:
    """What it says; None without it: one server has made the model. ModelNotLoaded if it cannot be read."""
    try:
        said = Parse(files.read_small(folder / NAME, LONGEST_BYTES).decode(), RankedModel())
        return WholeFile(int(said.world), int(said.rank), Layout(said.manifest))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelNotLoaded(model=folder.name, problem=f"{NAME}: {files.reason(error)}") from error
    except (ParseError, UnicodeDecodeError) as error:
        raise ModelNotLoaded(model=folder.name, problem=f"{NAME}: {error}") from error
    except PushstepError as error:
        raise ModelNotLoaded(model=folder.name, problem=f"{NAME}: {error.message}") from error


def shard_in(folder: Path, layout: Layout, ranks: Ranks | None) -> ModelShard | None:
    """Of which whole the part in a folder is; None of one server's model. ModelNotLoaded if it is not this rank's part.

    layout: of the part, as its snapshots have it.
    """
    said, name = read_whole(folder), folder.name
    if ranks is None:
        if said is not None:
            problem = f"it is the part of rank {said.rank} of {said.world}: start it as that"
            raise ModelNotLoaded(model=name, problem=problem)
        return None
    if said is None:
        raise ModelNotLoaded(model=name, problem="it lies in one server, not in several ranks")
    if (said.world, said.rank) != (ranks.world, ranks.rank):
        problem = f"it is the part of rank {said.rank} of {said.world}, and this is rank {ranks.rank} of {ranks.world}"
        raise ModelNotLoaded(model=name, problem=problem)
    shard = ranks.shard(said.whole)
    if shard.part is None or shard.part.layout.manifest_hash != layout.manifest_hash:
        raise ModelNotLoaded(model=name, problem=f"its snapshots are not of the part that {NAME} names")
    return shard
