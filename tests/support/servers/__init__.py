"""Servers of every kind, and what operators and networks do to them."""
