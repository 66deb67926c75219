"""Models that several tests share; each is made once a run."""

import signal
from pathlib import Path

import pytest
from support import tiny

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a suite in the background: programs under test would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_qwen3(tmp_path_factory.mktemp("qwen3"))
