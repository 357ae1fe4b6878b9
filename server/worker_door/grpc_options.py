"""How the server's end of gRPC is set: limits on messages, windows, connections and headers, and what it does about idle ones."""

from __future__ import annotations

from typing import Final

from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES, TRANSPORT_LIMIT_BYTES

from ..staging.budget import WINDOW_BYTES

GRPC_OPTIONS: Final = (
    # A little above our own limit, so a message slightly over that gets a named error. Of a larger message gRPC reads
    # only the length.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + (1 << 20)),
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    # Big HTTP/2 frames halve the receive cost of a chunk: 16 KiB frames are 64 Python objects per MiB.
    ("grpc.http2.max_frame_size", 4 << 20),
    # A sender fills its window before anyone reads it, so the staging budget counts windows. gRPC's bandwidth probe
    # would widen them.
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),
    # Calls that one connection runs at once. A session has its own connection, and at most 8 pushes in flight.
    ("grpc.max_concurrent_streams", 64),
    # Two servers on one port would each see half of the workers.
    ("grpc.so_reuseport", 0),
    # A new connection must speak HTTP/2 within this time. gRPC's default is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A connection without calls is closed; a gRPC client opens another with its next call. A connection's age has no
    # limit, because a push may be under way.
    ("grpc.max_connection_idle_ms", 600_000),
    # Workers and servers ping each other, to find a connection whose other end has vanished.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that pings more often than this three times is disconnected.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 2),
    # Limits on the headers of a call. Ours take some hundred bytes.
    ("grpc.max_metadata_size", 4 << 10),
    ("grpc.absolute_max_metadata_size", 8 << 10),
)
