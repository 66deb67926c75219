"""Models that several tests share; each is made once a run."""

import os
import signal
from pathlib import Path

import pytest
import torch
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


# ---- tests that need a card

_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a card, tests marked gpu are left out, and counted where everybody sees it."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not torch.cuda.is_available():
        config.stash[_LEFT_OUT] = len(gpu)
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} gpu tests were left out: this torch sees no CUDA device (make gpu-test runs them on one)"
        )
