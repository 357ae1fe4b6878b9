"""A server's data folder as a command is given it: found, and locked, so that no server uses it meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pushstep.proto.wire.names import is_name

from ..config import Config
from ..models.catalog import Catalog
from ..process.folder_lock import lock_folder
from ..storage.model_folder import model_folders


class NoDataFolder(Exception):
    """A folder is neither a server's data folder nor a model's folder in one."""


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A data folder, and those of its models that a command is about."""

    path: Path
    models: list[str]
    # where its snapshots are, if not in it
    snapshots: str | None = None

    def catalog(self) -> Catalog:
        """A catalog on the folder that holds no model yet. It serves nobody. ValueError if settings are wrong.

        StorageFailed if the folder's snapshots are elsewhere and nobody has said where.
        """
        elsewhere = {} if self.snapshots is None else {"snapshots": self.snapshots}
        return Catalog(Config.read({"data": str(self.path), **elsewhere}, None))


@contextlib.contextmanager
def opened(path: Path, snapshots: str | None = None) -> Iterator[DataFolder]:
    """The data folder that `path` is, or in which it is one model's, locked for a block.

    NoDataFolder, DataFolderLocked, StorageFailed, OSError.
    """
    path = Path(os.path.abspath(path))
    if (path / "models").is_dir():
        data, names = path, [name for name in model_folders(path / "models") if is_name(name)]
    elif path.parent.name == "models" and path.is_dir():
        data, names = path.parent.parent, [path.name]
    else:
        raise NoDataFolder(f"{path} is no data folder of a server: it has no folder `models`, and is in none")
    # a folder that no server has ever used is not written to
    lock = lock_folder(data) if os.path.lexists(data / "lock") else None
    try:
        yield DataFolder(data, names, snapshots)
    finally:
        if lock is not None:
            os.close(lock)
