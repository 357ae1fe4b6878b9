"""`python -m tests.simulation SEED`: one run again, with what happens in it."""

from __future__ import annotations

import sys

from .chaos import run

if len(sys.argv) != 2:
    sys.exit(__doc__)
simulation = run(int(sys.argv[1]), log=True)
witness = simulation.house.witness
print(
    f"{len(witness.story)} versions on timeline {witness.timeline}; {witness.outcomes}; {simulation.network.counts}"
)
