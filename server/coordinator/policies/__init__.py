"""The policies: they decide when a push is applied."""
