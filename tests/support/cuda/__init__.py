"""CUDA without a device: models of its streams and its driver, and what its kernels must give."""
