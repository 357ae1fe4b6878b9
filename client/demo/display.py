"""Shows the demo's progress: bars on a terminal, about ten lines per training elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_PLAIN_LINES: Final = 10


class Display:
    """Prints the demo's progress for a person: on stdout, or on stderr if a program reads stdout."""

    def __init__(self, *, stderr: bool = False) -> None:
        self.console = Console(stderr=stderr, highlight=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields `show(done, note)`; `note` is a short text beside the count, such as the latest loss."""
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
