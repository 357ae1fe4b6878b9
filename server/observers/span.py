"""An OpenTelemetry span for each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import Field

from ..coordinator.hooks.hook import Hook, Place, Point
from ..coordinator.settings import Positive, Settings
from ..traces.provider import provider, require_installed

SPAN: Final = "pushstep.step"
FACTS: Final = ("model", "timeline", "version", "worker", "staleness", "gradient_norm", "clip_factor")
NANOSECONDS: Final = 1e9
FLUSH_MS: Final = 5000


class SpanSettings(Settings):
    """How often."""

    every: Positive = Field(1, description="a span for each n-th step only")


class Span(Hook):
    """Sends a span `pushstep.step` for each step, from when it was queued until it was taken, with its numbers.

    It goes where the server's environment says: OTEL_EXPORTER_OTLP_ENDPOINT and the other variables of OpenTelemetry.
    """

    name: ClassVar[str] = "otel_span"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_POST})
    settings_type: ClassVar[type[Settings]] = SpanSettings
    settings: SpanSettings

    def __init__(self, hook_id: str, point: Point, settings: SpanSettings) -> None:
        super().__init__(hook_id, point, settings)
        self._seen = 0
        self._provider: Any = None

    def prepare(self, place: Place) -> None:
        """MissingExtra if OpenTelemetry's SDK is not installed."""
        require_installed(f"the hook {self.name}")

    def open(self, place: Place) -> None:
        """Begin. MissingExtra."""
        self.prepare(place)
        self._provider = provider()

    def observe(self, event: Mapping[str, Any]) -> None:
        """Send a step's span."""
        self._seen += 1
        if self._provider is None or self._seen % self.settings.every:
            return
        end_ns = int(event["time"] * NANOSECONDS)
        took_ns = int((event["queue_s"] + event["step_s"]) * NANOSECONDS)
        attributes = {f"pushstep.{name}": event[name] for name in FACTS if event.get(name) is not None}
        attributes |= {f"pushstep.metrics.{name}": value for name, value in event["metrics"].items()}
        tracer = self._provider.get_tracer("pushstep")
        tracer.start_span(SPAN, start_time=end_ns - took_ns, attributes=attributes).end(end_ns)

    def close(self) -> None:
        """Send what is left."""
        flush = getattr(self._provider, "force_flush", None)
        if flush is not None:
            flush(FLUSH_MS)
