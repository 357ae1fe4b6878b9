"""The CPU backend: numba's kernels, run by a pool of threads."""
