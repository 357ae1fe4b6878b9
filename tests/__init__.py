"""The tests, and what they are written with."""
