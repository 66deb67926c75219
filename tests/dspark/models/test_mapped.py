"""Giving back what a mapped file takes: the memory goes, the contents stay."""

import sys
from pathlib import Path

import pytest
import torch

from dspark.models.weights import SafetensorsSource, write_tensors

SIZE = 64 << 20


def resident() -> int:
    """Bytes of files in this process's memory."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_go_and_contents_stay(tmp_path: Path) -> None:
    weight = torch.arange(SIZE // 4, dtype=torch.float32).view(-1, 64)
    write_tensors(tmp_path / "model.safetensors", {"w": weight})
    with SafetensorsSource(tmp_path) as source:
        mapped = source.get("w", tuple(weight.shape), torch.float32)
        assert torch.equal(mapped, weight)
        full = resident()
    assert resident() < full - SIZE // 2
    assert torch.equal(mapped[[5, 1000]], weight[[5, 1000]])
    assert torch.equal(mapped, weight)
