"""What can go wrong in the demo; each message says what to do or shows what the failing process said."""

from __future__ import annotations


class DemoFailed(RuntimeError):
    """The demo could not go on."""


class FlightsMissing(DemoFailed):
    """The flight tables are not installed."""


class FlightsChanged(DemoFailed):
    """The flight tables are not the ones this demo was made for."""


class ProcessFailed(DemoFailed):
    """A process of the demo ended badly, fell silent or said something unexpected."""
