"""Versions of a model that are read beside training, whatever steps overwrite meanwhile."""
