"""What both ends of every connection agree on."""

from __future__ import annotations

from dspark.errors import ConfigError

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
REQUEST_ID = "x-request-id"  # metadata: the id that log lines of all services share
API_KEY = "x-api-key"  # metadata: whose rate a request counts against
RETRY_AFTER = "retry-after-ms"  # trailing metadata of RESOURCE_EXHAUSTED

MAX_PORT = 65535

Options = list[tuple[str, int]]


def check_address(address: str) -> None:
    """`ConfigError` unless it is host:port with a port that exists: gRPC takes 99999 as 34463 without a word."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) <= MAX_PORT):
        raise ConfigError(f"{address} is not host:port with a port up to {MAX_PORT}")


def _common(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A dead peer is noticed within 15 s on an idle stream, so that nothing waits for TCP to give up.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(max_message_bytes: int) -> Options:
    """Options of a client's channel."""
    return [
        *_common(max_message_bytes),
        # A repeated step is for the router to decide: a transparent retry would hide a dead worker.
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name how long an attempt to connect may take: a busy machine needs more than a moment.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def server_options(max_message_bytes: int) -> Options:
    """Options of a service's server."""
    return [
        *_common(max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Two processes on one port would share its connections silently; the second must fail to bind.
        ("grpc.so_reuseport", 0),
    ]
