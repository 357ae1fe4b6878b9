"""pushstep: a training service that takes your optimizer step for you. The parts are the subpackages."""

from __future__ import annotations

from importlib.metadata import version


def __getattr__(name: str) -> str:
    """`pushstep.__version__`, looked up when it is asked for."""
    if name == "__version__":
        return version("pushstep")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
