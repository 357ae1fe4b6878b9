"""The one table of who may do what: every route, every RPC, and every message of the local socket.

Both doors decide by this table alone. The server does not start while one of its routes or RPCs has no entry here, and
a test finds entries that belong to nothing. The doors ask for nothing while no tokens are configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pushstep.proto.shared_memory.local_socket import Method

from .roles import Need

_MODEL: Final = "/v1/models/{m}"

# Method and path, as OpenAPI writes them.
ROUTES: Final[Mapping[str, Need]] = {
    "GET /healthz": Need.OPEN,
    "GET /readyz": Need.OPEN,
    # files that say nothing about the server; what they show comes from the routes below, with the token that they ask for
    "GET /ui": Need.OPEN,
    "GET /ui/{asset}": Need.OPEN,
    "GET /metrics": Need.VIEWER,
    "GET /openapi.json": Need.MEMBER,
    "HEAD /openapi.json": Need.MEMBER,
    "GET /v1": Need.MEMBER,
    "GET /v1/capacity": Need.VIEWER,
    "GET /v1/shards": Need.VIEWER,
    "GET /v1/hooks": Need.VIEWER,
    "GET /v1/models": Need.VIEWER,
    "POST /v1/models": Need.OPERATOR,
    f"GET {_MODEL}": Need.VIEWER,
    f"DELETE {_MODEL}": Need.OPERATOR,
    f"GET {_MODEL}/param-groups": Need.VIEWER,
    f"POST {_MODEL}/param-groups": Need.OPERATOR,
    f"GET {_MODEL}/param-groups/{{index}}": Need.VIEWER,
    f"PATCH {_MODEL}/param-groups/{{index}}": Need.OPERATOR,
    f"GET {_MODEL}/parameters": Need.VIEWER,
    f"GET {_MODEL}/parameters/{{name}}": Need.VIEWER,
    f"GET {_MODEL}/hooks": Need.VIEWER,
    f"POST {_MODEL}/hooks": Need.OPERATOR,
    f"GET {_MODEL}/hooks/{{hook_id}}": Need.VIEWER,
    f"PATCH {_MODEL}/hooks/{{hook_id}}": Need.OPERATOR,
    f"DELETE {_MODEL}/hooks/{{hook_id}}": Need.OPERATOR,
    f"GET {_MODEL}/policy": Need.VIEWER,
    f"PATCH {_MODEL}/policy": Need.OPERATOR,
    f"GET {_MODEL}/gate": Need.VIEWER,
    f"PATCH {_MODEL}/gate": Need.OPERATOR,
    f"GET {_MODEL}/workers": Need.VIEWER,
    f"GET {_MODEL}/workers/{{worker}}": Need.VIEWER,
    f"DELETE {_MODEL}/workers/{{worker}}": Need.OPERATOR,
    f"POST {_MODEL}/workers/{{worker}}/quarantine": Need.OPERATOR,
    f"POST {_MODEL}/workers/{{worker}}/release": Need.OPERATOR,
    f"GET {_MODEL}/snapshots": Need.VIEWER,
    f"POST {_MODEL}/snapshots": Need.OPERATOR,
    f"GET {_MODEL}/snapshots/{{snapshot}}": Need.VIEWER,
    f"DELETE {_MODEL}/snapshots/{{snapshot}}": Need.OPERATOR,
    f"POST {_MODEL}/snapshots/{{snapshot}}/restore": Need.OPERATOR,
    f"GET {_MODEL}/snapshots/{{snapshot}}/content": Need.VIEWER,
    f"GET {_MODEL}/durability": Need.VIEWER,
    f"PATCH {_MODEL}/durability": Need.OPERATOR,
    f"POST {_MODEL}/restore": Need.OPERATOR,
    f"GET {_MODEL}/export": Need.VIEWER,
    f"GET {_MODEL}/state-dict": Need.VIEWER,
    f"PUT {_MODEL}/state-dict": Need.OPERATOR,
    f"GET {_MODEL}/events": Need.VIEWER,
}

# A token may be for some models only. A route's model is its `{m}`, or in this field of the query. What these routes
# tell is of all models, so such a token is not for them.
MODEL_IN: Final[Mapping[str, str]] = {"POST /v1/models": "name", "GET /v1/capacity": "model"}
OF_ALL_MODELS: Final = frozenset({"GET /metrics"})

_TRAINING: Final = "/pushstep.v1.TrainingService"
_SHARDS: Final = "/pushstep.v1.ShardService"
_HEALTH: Final = "/grpc.health.v1.Health"

# Full names of the methods. A method's model is the `model` of its request or of its header.
RPCS: Final[Mapping[str, Need]] = {
    f"{_TRAINING}/Describe": Need.MEMBER,
    f"{_TRAINING}/Join": Need.WORKER,
    f"{_TRAINING}/JoinInParts": Need.WORKER,
    f"{_TRAINING}/Heartbeat": Need.WORKER,
    f"{_TRAINING}/Leave": Need.WORKER,
    f"{_TRAINING}/OpenRegion": Need.WORKER,
    f"{_TRAINING}/Upload": Need.WORKER,
    f"{_TRAINING}/Push": Need.WORKER,
    f"{_TRAINING}/Exchange": Need.WORKER,
    # a stream that stays open
    f"{_TRAINING}/TakeSteps": Need.WORKER,
    f"{_TRAINING}/Pull": Need.WORKER,
    f"{_TRAINING}/PullRows": Need.WORKER,
    f"{_TRAINING}/PullState": Need.WORKER,
    f"{_TRAINING}/PullExtras": Need.WORKER,
    # the other ranks of this server's job; what they say changes models
    f"{_SHARDS}/Link": Need.OPERATOR,
    f"{_SHARDS}/Give": Need.OPERATOR,
    f"{_HEALTH}/Check": Need.OPEN,
    f"{_HEALTH}/List": Need.MEMBER,
    # a stream that stays open
    f"{_HEALTH}/Watch": Need.MEMBER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Need.MEMBER,
}

# Calls over the socket of a region. The socket is handed over for the one-time token of an OpenRegion, and its caller is
# that call's. So a region ends with the token that opened it.
LOCAL_SOCKET: Final[Mapping[Method, Need]] = {
    Method.PUSH: Need.WORKER,
    Method.EXCHANGE: Need.WORKER,
}
