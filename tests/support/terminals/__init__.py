"""Terminals that programs draw on."""
