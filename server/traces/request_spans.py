"""Spans of requests, by OpenTelemetry (`--otel`); the callers' spans are their parents.

Nothing of OpenTelemetry is imported unless it is asked for. The OTEL_* variables say where the spans go, as in every
program that uses OpenTelemetry's SDK.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..process.request_log import TRACE_ID, subject
from .provider import provider, require_installed

# W3C's header: version, trace, parent, flags.
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
TRACEPARENT: Final = "traceparent"
# How long the process waits at its end for the last spans to be exported.
LAST_MS: Final = 2000


def trace_of(traceparent: str) -> str:
    """The id of the trace that a caller's header names; empty if it names none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return "" if found is None else found[1]


class Traces:
    """Makes spans. Use it on the event loop."""

    def __init__(self) -> None:
        """MissingExtra without OpenTelemetry's SDK."""
        require_installed("--otel")
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider()
        self._tracer = self._provider.get_tracer("pushstep.server")
        self._parent: Callable[[dict[str, str]], Any] = TraceContextTextMapPropagator().extract
        self._server, self._error = trace.SpanKind.SERVER, trace.StatusCode.ERROR

    @contextmanager
    def span(self, name: str, traceparent: str) -> Iterator[None]:
        """A span around a request. `traceparent`: what its caller sent; if it is empty, a new trace begins."""
        span = self._tracer.start_span(
            f"pushstep.server.{name}", self._parent({TRACEPARENT: traceparent}), kind=self._server
        )
        token = TRACE_ID.set(f"{span.get_span_context().trace_id:032x}")
        try:
            yield
        except BaseException as error:
            span.set_status(self._error, type(error).__name__)
            raise
        finally:
            model, worker, sequence = subject()
            span.set_attributes(
                {"pushstep.model": model, "pushstep.worker": worker, "pushstep.sequence": sequence}
            )
            span.end()
            TRACE_ID.reset(token)

    def end(self) -> None:
        """Flush the last spans. Waits for LAST_MS at most."""
        flush = getattr(self._provider, "force_flush", None)
        if flush is not None:
            flush(LAST_MS)
