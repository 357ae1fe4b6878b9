"""Disks and stores that are small, or fail."""
