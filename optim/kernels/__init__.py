"""The kernels that numba compiles for the CPU, and the cache that keeps them."""
