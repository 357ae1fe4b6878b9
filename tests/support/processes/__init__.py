"""Processes that are forked, killed, interrupted or bounded."""
