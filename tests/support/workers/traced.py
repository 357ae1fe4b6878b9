"""A worker in a process of its own, whose program has set OpenTelemetry up; prints its spans as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pushstep.client import connect

address, shares = sys.argv[1], sys.argv[2] == "shared"
kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)

parameter = torch.nn.Parameter(torch.ones(4))
for prefetch in (False, True):
    session = connect(address, model=f"traced-{shares}-{prefetch}", worker="w0", shared_memory=shares)
    optimizer = session.attach(torch.optim.Adagrad([parameter], lr=0.1), names=["p"], prefetch=prefetch)
    for _ in range(2):
        with trace.get_tracer("program").start_as_current_span("batch"):
            parameter.grad = torch.ones(4)
            optimizer.step()
    optimizer.synchronize()
    session.close()
session = connect(address, model=f"traced-{shares}-False", worker="w1", shared_memory=shares)
session.member()
session.pull()
session.push({"p": np.ones(4, dtype=np.float32)})
session.close()
for span in kept.get_finished_spans():
    context = span.get_span_context()
    assert context is not None
    shown = {
        "name": span.name,
        "trace": f"{context.trace_id:032x}",
        "span": f"{context.span_id:016x}",
        "parent": "" if span.parent is None else f"{span.parent.span_id:016x}",
        "attributes": dict(span.attributes or {}),
    }
    print(json.dumps(shown))
