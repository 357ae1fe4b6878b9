"""The CUDA backend: kernels in Triton, and the code that launches them."""
