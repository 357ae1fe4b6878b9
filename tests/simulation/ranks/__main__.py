"""`python -m tests.simulation.ranks SEED`: one run again, with what happens in it."""

from __future__ import annotations

import sys

from .chaos import run

if len(sys.argv) != 2:
    sys.exit(__doc__)
found = run(int(sys.argv[1]), log=True)
witness = found.group.witness
print(
    f"{found.group.world_size} ranks at {found.group.level}, started {found.group.starts} times: "
    f"{len(witness.story)} versions on timeline {witness.timeline}; {witness.outcomes}"
)
