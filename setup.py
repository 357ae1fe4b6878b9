"""The packages are found, not listed; pyproject.toml has everything else."""

from setuptools import find_packages, setup

PARTS = ("proto", "optim", "server", "client")
found = find_packages(include=[pattern for part in PARTS for pattern in (part, f"{part}.*")])
setup(packages=["pushstep", *(f"pushstep.{name}" for name in found)])
