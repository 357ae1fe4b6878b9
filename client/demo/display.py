"""What the demo shows while it runs: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_PLAIN_LINES: Final = 10


class Display:
    """Tells a person how far the demo is, on stdout, or on stderr where stdout belongs to a program."""

    def __init__(self, *, stderr: bool = False) -> None:
        self.console = Console(stderr=stderr, highlight=False)

    def say(self, text: str) -> None:
        """One line of the story."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields `show(done, note)`; the note is the newest figure worth seeing."""
        if not self.console.is_terminal:
            yield self._plain(label, total)
            return
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        with bar:
            task = bar.add_task(label, total=total, note="")

            def show(done: int, note: str) -> None:
                bar.update(task, completed=done, note=note)

            yield show

    def _plain(self, label: str, total: int) -> Callable[[int, str], None]:
        every = max(1, total // _PLAIN_LINES)

        def show(done: int, note: str) -> None:
            if done % every == 0 or done == total:
                self.say(f"{label}: {done}/{total}  {note}")

        return show
