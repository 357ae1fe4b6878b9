"""The demo's errors. Each message says what to do, or shows the log of the process that failed."""

from __future__ import annotations


class DemoFailed(RuntimeError):
    """The demo could not go on."""


class FlightsMissing(DemoFailed):
    """The flight tables are not installed."""


class FlightsChanged(DemoFailed):
    """The flight tables are not the ones this demo was made for."""


class ProcessFailed(DemoFailed):
    """A process of the demo failed, printed nothing for too long, or printed something unexpected."""
