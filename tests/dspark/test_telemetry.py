import json
import subprocess
import sys
import urllib.request
from typing import Any

import prometheus_client
import pytest

from dspark.errors import ConfigError
from dspark.telemetry import configure_logging, start_metrics_server

PROGRAM = """
import logging, warnings, structlog
from dspark.telemetry import configure_logging, request_context
configure_logging("router", worker_id="r1")
log = structlog.get_logger("x")
log.debug("hidden")
log.info("ready", address="h:1")
with request_context("q7", user="u"):
    log.warning("inside", odd=object())
logging.getLogger("lib").warning("from %s", "elsewhere")
logging.getLogger("lib").info("hidden")
warnings.warn("careful", stacklevel=1)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken")
log.info("outside")
"""


def lines_of(program: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_json_with_service_and_request() -> None:
    lines = lines_of(PROGRAM)
    assert [line["event"] for line in lines if "careful" not in line["event"]] == [
        "ready",
        "inside",
        "from elsewhere",
        "broken",
        "outside",
    ]
    assert all(line["service"] == "router" and line["worker_id"] == "r1" for line in lines)
    assert all({"timestamp", "level"} <= set(line) for line in lines)
    by_event = {line["event"]: line for line in lines}
    assert by_event["ready"]["address"] == "h:1"
    assert by_event["inside"]["request_id"] == "q7"
    assert by_event["inside"]["user"] == "u"
    assert "request_id" not in by_event["outside"]
    assert "ZeroDivisionError" in by_event["broken"]["exception"]
    assert any("careful" in line["event"] for line in lines)


def test_an_unknown_level_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'loud'"):
        configure_logging("x", level="loud")


def test_metrics_are_served_on_a_free_port() -> None:
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("rounds", "Rounds done.", registry=registry).inc(3)
    with start_metrics_server(registry=registry) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
            assert b"rounds_total 3.0" in response.read()
        with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}"):
            start_metrics_server(server.port, registry=registry)
