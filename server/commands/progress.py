"""The progress of long work, on stderr, if that is a terminal: what is being done, and how much of it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# What is begun now; all that was begun before is done. Or None, for one more of the same.
Told = Callable[[str | None], None]


def untold(_: str | None) -> None:
    """For work whose progress nobody sees."""


@contextlib.contextmanager
def shown(total: int | None, *, quiet: bool) -> Iterator[Told]:
    """A bar for the length of a block, in which `total` things are done; None if nobody knows how many."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if quiet or not console.is_terminal:
        yield untold
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = False

        def told(what: str | None) -> None:
            nonlocal begun
            if begun:
                bar.advance(task)
            begun = True
            if what is not None:
                bar.update(task, description=escape(what))

        yield told
