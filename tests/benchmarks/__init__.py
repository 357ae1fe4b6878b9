"""Side-by-side measurements: `python -m tests.benchmarks [name ...] [--quick]`."""
