"""Markdown tables, printed row by row."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], others_share: float | None = None
) -> None:
    """Print one: the first column is words, the others are numbers. Of what was measured, says how busy strangers kept the CPUs."""
    print(f"\n### {title}")
    if others_share is not None:
        print(f"\nOther processes had {others_share:.0%} of the CPUs meanwhile.")
    print(f"\n| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def count(elements: int) -> str:
    """10000 as 10 K, 16000000 as 16 M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "K")):
        if elements >= unit:
            return f"{elements / unit:g} {letter}"
    return str(elements)


def decided(ratio: float, floor: float) -> tuple[str, str]:
    """What was asked, and whether it is met."""
    return f"{floor:g}", "yes" if ratio >= floor else "**no**"
