"""What the design asks of the transport: how many times as fast as whom, at least."""

from __future__ import annotations

from dataclasses import dataclass

STREAM_OF_SOCKET = 0.5
CROWD_OF_ONE = 1.0
PUSHES_BESIDE_PULLS = 0.9
PUSHES_BESIDE_HOSTILE = 0.9
SYNC_OF_GLOO = 1.5
# of 10 K parameters: over TCP, of bare gRPC's speed and of torch.distributed.rpc's best; through shared memory, of the latter
SMALL_OF_GRPC = 0.6
SMALL_OF_RPC = 0.8
SMALL_SHARED_OF_RPC = 1.5
# of the pushes per second that a bare grpc.aio server takes of as many workers
MANY_OF_GRPC = 0.5
# Rows pushed and pulled over TCP: how many times as fast as the best side whose name begins so.
ROWS = (("rpc", 2.0), ("ray", 3.0), ("gRPC", 0.5))
# Tables that the worker holds, of torch's local step's speed.
ROWS_OF_LOCAL = {"pushstep shm": 2.5, "pushstep tcp": 1.2}
# Of torch's local foreach step's speed.
TENSORS_OF_LOCAL = {20_000: 1.5}
MODELS_OF_LOCAL = 1.0


@dataclass(frozen=True, slots=True)
class Floor:
    """A side must be `times` as fast as the best side whose name begins with `against`."""

    side: str
    rule: str
    elements: int
    against: str
    times: float


def _over_tcp(wire: str, adadelta: float, adagrad: float) -> list[Floor]:
    return [
        Floor(f"pushstep tcp {wire}", "adadelta", 16_000_000, "rpc", adadelta),
        Floor(f"pushstep tcp {wire}", "adagrad", 16_000_000, "rpc", adagrad),
    ]


EXCHANGE = [
    *_over_tcp("float32", 1.0, 0.6),
    *_over_tcp("bfloat16", 1.6, 1.1),
    *_over_tcp("int8", 2.2, 1.6),
    Floor("pushstep shm float32", "adadelta", 16_000_000, "local", 2.0),
    Floor("pushstep shm float32", "adagrad", 16_000_000, "rpc", 3.0),
    Floor("pushstep shm float32", "adagrad", 16_000_000, "ray actor, tensors", 4.0),
    Floor("pushstep shm float32", "adagrad", 16_000_000, "ray actor, arrays", 4.0),
    *(
        Floor(f"pushstep {transport} float32", rule, 10_000, "rpc", 1.0)
        for transport in ("tcp", "unix", "shm")
        for rule in ("adadelta", "adagrad")
    ),
]
