"""Models that several tests share; each is made once a run."""

import os
import signal
from pathlib import Path

import pytest
from support import tiny

# In the background a suite ignores Ctrl-C, and the programs that it tests would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Programs that tests start measure nothing, unless a test is about that.
os.environ.setdefault("DSPARK_PROFILE", "off")
os.environ.setdefault("DSPARK_POLICY", "fixed:5")


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_qwen3(tmp_path_factory.mktemp("qwen3"))
