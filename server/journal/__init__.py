"""The log of what changes a model: recorded before it is done, read back after a crash."""
