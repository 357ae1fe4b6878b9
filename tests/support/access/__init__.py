"""Tokens and certificates of the tests' own."""
