"""The kernels of what hooks do to gradients before a step, and to parameters after it."""
