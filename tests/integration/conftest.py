"""A tiny pair of target and drafter that agree often enough to be interesting, and clusters that serve it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import drafters, tiny
from support.clusters import ClusterOf

from dspark.cluster import Cluster

EXACT = ("--dtype", "float32", "--threads", "1", "--page-size", "16")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Target and drafter with flat distributions: with shared noise some drafts are right and some wrong."""
    target = tiny.save_qwen3(
        tmp_path_factory.mktemp("target"),
        vocab_size=drafters.VOCAB,
        hidden_size=drafters.HIDDEN,
        num_hidden_layers=5,
        initializer_range=0.1,
    )
    drafter = tmp_path_factory.mktemp("drafter")
    drafters.save_published(drafter, block_size=7)
    return target, drafter


@pytest.fixture
def cluster_of(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> ClusterOf:
    """Makes clusters of the pair (or of the target alone, with `drafter="none"`); `both`: arguments of its workers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(drafter: str | Path | None = None, *, both: Sequence[str] = (), **settings: Any) -> Cluster:
        draft, verify = (*EXACT[:4], *both), (*EXACT, *both)
        return Cluster(pair[0], drafter or pair[1], draft_args=draft, verify_args=verify, **settings)

    return make
