"""A server's description by one small call, without the channel that carries tensors: importing torch takes seconds."""

from __future__ import annotations

from typing import Final

import grpc

from pushstep.proto.training_pb2 import DescribeRequest, DescribeResponse

from ..transport.address import Address
from ..transport.security import Security

_METHOD: Final = "/pushstep.v1.TrainingService/Describe"
DIAL_S: Final = 3.0
_OPTIONS: Final = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


def described(address: str, security: Security, timeout_s: float) -> DescribeResponse | None:
    """The description of the server at an address. None if there is none within that time: `dial` finds out why.

    InvalidAddress for a malformed address.
    """
    target = Address(address).target
    credentials = security.credentials()
    if credentials is None:
        channel = grpc.insecure_channel(target, options=_OPTIONS)
    else:
        channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
    with channel:
        call = channel.unary_unary(
            _METHOD,
            request_serializer=DescribeRequest.SerializeToString,
            response_deserializer=DescribeResponse.FromString,
        )
        try:
            return call(DescribeRequest(), timeout=timeout_s, metadata=security.metadata)
        except grpc.RpcError:
            return None


def description_of(server: str, security: Security, wait_s: float = 0.0) -> DescribeResponse:
    """What a server says of itself. `wait_s`: how long it is waited for. Raises what `dial` raises."""
    found = described(server, security, DIAL_S)
    if found is None:
        # it finds out why, which takes longer
        from ..transport.channel import Transport
        from ..transport.dial import dial

        transport, found = dial(Transport, server, timeout_s=DIAL_S, wait_s=wait_s, security=security)
        transport.close()
    return found
