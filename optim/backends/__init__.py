"""Which path takes a step, and the path in plain torch operations."""
