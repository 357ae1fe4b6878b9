"""Spans of steps, pushes and pulls, in the traces of a program that has set OpenTelemetry up.

OpenTelemetry is imported here only if the program has imported it before it connected. Otherwise a span costs a comparison.
Each call sends the id of the span that it is made in, so the server's span becomes its child.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, Final, TypeVar

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...] | None
TRACEPARENT: Final = "traceparent"
_NOTHING: Final = nullcontext()


class Spans:
    """Makes the spans of one session."""

    def __init__(self) -> None:
        """Look once whether OpenTelemetry has been set up; that holds for the whole session."""
        self._tracer: Any = None
        self._inject: Callable[[dict[str, str]], None] = lambda carrier: None
        if "opentelemetry.trace" not in sys.modules:
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        provider = trace.get_tracer_provider()
        if not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
            self._tracer = provider.get_tracer("pushstep.client")
            self._inject = TraceContextTextMapPropagator().inject

    def span(self, name: str, **attributes: Any) -> AbstractContextManager[Any]:
        """A context manager in which a new span is the current one. Gives the span, for `note`; None without OpenTelemetry."""
        if self._tracer is None:
            return _NOTHING
        made: AbstractContextManager[Any] = self._tracer.start_as_current_span(
            f"pushstep.{name}", attributes={f"pushstep.{key}": value for key, value in attributes.items()}
        )
        return made

    def note(self, span: Any, **facts: Any) -> None:
        """Add facts to a span that `span` gave."""
        span.set_attributes({f"pushstep.{key}": value for key, value in facts.items()})

    def traceparent(self) -> str:
        """The current span, as W3C's trace context writes it; empty without one."""
        if self._tracer is None:
            return ""
        carrier: dict[str, str] = {}
        self._inject(carrier)
        return carrier.get(TRACEPARENT, "")

    def metadata(self, others: Metadata) -> Metadata:
        """The metadata of a call: `others`, and the current span's traceparent if there is one."""
        if self._tracer is None:
            return others
        current = self.traceparent()
        return (*(others or ()), (TRACEPARENT, current)) if current else others

    def here(self, call: Callable[[], T]) -> Callable[[], T]:
        """Wrap `call` so that it runs within the span that is current here, also in another thread."""
        return call if self._tracer is None else partial(copy_context().run, call)
