"""Kernels over rows of tables: their step, and what merges and moves them."""
