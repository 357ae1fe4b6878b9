"""The process's tracer provider: the one that is set up already, or one made from OpenTelemetry's variables."""

from __future__ import annotations

import importlib.util
import threading
from typing import Any, Final

from pushstep.proto.errors import MissingExtra

_lock: Final = threading.Lock()
_own: Final[list[Any]] = []


def require_installed(what: str) -> None:
    """MissingExtra if OpenTelemetry's SDK is not installed. `what`: the feature that needs it."""
    for package in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # its parent package is missing
            found = None
        if found is None:
            raise MissingExtra(what=what, package="opentelemetry-sdk", extra="otel")


def provider() -> Any:
    """The process's tracer provider. If there is none, one is made from the environment."""
    from opentelemetry import trace

    found = trace.get_tracer_provider()
    if not isinstance(found, trace.ProxyTracerProvider):
        return found
    with _lock:
        if not _own:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            made = TracerProvider(resource=Resource.create({"service.name": "pushstep-server"}))
            made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            _own.append(made)
        return _own[0]
