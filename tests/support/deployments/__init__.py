"""Servers that are started as deploy/ says."""
