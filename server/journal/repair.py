"""Cuts a journal off in front of a damaged record, so that its model can be loaded again. Nothing is deleted.

The order of the steps makes a repair that breaks off harmless: until its last step a start still refuses the model.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..storage import files
from .chain import MARKER
from .examination import FileFinding

ASIDE: Final = ".damaged-"
_CUT_SUFFIX: Final = ".cut"
_COPIED_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair of one journal will do."""

    folder: Path
    # the damaged record, and why it is
    record: int
    problem: str
    # the file that keeps its records before, and how many of its bytes those are; None if no file does
    cut: Path | None
    cut_bytes: int
    # files that are renamed, whole
    aside: Sequence[Path]
    # (timeline, version) behind the last record that stays, of those behind the snapshot; None if there is none
    ends_at: tuple[int, int] | None
    # True if records that were on the disk are not replayed any more
    loses: bool

    def steps(self) -> list[str]:
        """What it will do, in words."""
        said = []
        if self.cut is not None:
            said.append(
                f"{self.cut.name}: keep the first {self.cut_bytes} bytes, and the whole file beside it"
            )
        said += [f"{path.name}: rename it to {path.name}{ASIDE}N" for path in self.aside]
        return said

    def run(self) -> None:
        """Do it. StorageFailed, DiskFull; then it can be run again."""
        try:
            for path in self.aside:
                os.rename(path, _free_name(path))
            if self.cut is not None:
                self._cut_off(self.cut)
            files.fsync(self.folder)
            if self.loses:
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / MARKER).unlink()
                files.fsync(self.folder)
        except OSError as error:
            name = f"models/{self.folder.parent.name}/journal"
            raise files.refusal(name, error, self.folder, self.cut_bytes) from error

    def _cut_off(self, path: Path) -> None:
        new = path.with_name(path.name + _CUT_SUFFIX)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with files.opened(path) as source, os.fdopen(os.open(new, flags, 0o600), "wb") as target:
            at = 0
            while at < self.cut_bytes:
                block = os.pread(source, min(_COPIED_BYTES, self.cut_bytes - at), at)
                target.write(block)
                at += len(block)
            target.flush()
            os.fsync(target.fileno())
        os.link(path, _free_name(path))
        os.replace(new, path)


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{ASIDE}{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def repair_of(findings: Sequence[FileFinding], after: int) -> Repair | None:
    """What lets a start replay the records behind number `after`; None if nothing keeps it from that.

    Damage before that concerns older snapshots only. It stays as it is, unless a file has no whole record: a start reads
    the headers of all files.
    """
    for index, found in enumerate(findings):
        if not found.problem:
            continue
        is_old = index + 1 < len(findings) and findings[index + 1].first - 1 <= after
        if not is_old:
            return _cut(findings, index, after)
        if found.last < found.first:
            aside = [older.path for older in findings[: index + 1]]
            rest = repair_of(findings[index + 1 :], after)
            if rest is None:
                return Repair(
                    found.path.parent, found.record, found.problem, None, 0, aside, None, loses=False
                )
            return replace(rest, aside=[*aside, *rest.aside])
    return None


def _cut(findings: Sequence[FileFinding], index: int, after: int) -> Repair:
    """Keep what is in front of the damage in file `index`, if it is what a start replays."""
    found = findings[index]
    keeps = found.record > max(found.first, after) and found.end > 0
    # a good file whose next record is missing stays as it is
    is_whole = keeps and found.record == found.last + 1 and not _is_more(found)
    behind = [later.path for later in findings[index + 1 :]]
    aside = behind if keeps else [found.path, *behind]
    if not keeps and found.first <= after:  # nothing of it leads on from the snapshot
        aside = [file.path for file in findings[: index + 1]] + behind
    kept = findings[: index + 1] if keeps else findings[:index]
    ends = [file.ends_at for file in kept if file.ends_at is not None and file.last > after]
    cut = found.path if keeps and not is_whole else None
    cut_bytes = found.end if cut is not None else 0
    ends_at = ends[-1] if ends else None
    return Repair(found.path.parent, found.record, found.problem, cut, cut_bytes, aside, ends_at, loses=True)


def _is_more(found: FileFinding) -> bool:
    return found.size_bytes > found.end
