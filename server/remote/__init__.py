"""Snapshots in a store of objects: one place by URL for a server, through fsspec."""
