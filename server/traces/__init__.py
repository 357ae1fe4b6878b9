"""Spans by OpenTelemetry: where they go, and those of requests."""
