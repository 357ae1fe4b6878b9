"""The optimizer that a training loop holds: its step, its checkpoints, its overlap with backward."""
