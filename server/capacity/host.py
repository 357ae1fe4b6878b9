"""What the kernel says of the host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

MEMORY: Final = Path("/proc/meminfo")


def host_memory() -> Mapping[str, int]:
    """By the kernel's names, in bytes; nothing where there is no such file."""
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines if len(line.split()) >= 2)
    return {name.rstrip(":"): int(count) * 1024 for name, count in pairs if count.isdigit()}
