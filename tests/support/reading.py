"""The other end of a feature stream, and what should come through it."""

import itertools
from pathlib import Path

import torch
import transformers

from dspark.errors import DSparkError
from dspark.messages import FeatureBlock, SequenceKey, TapInfo
from services.verifier.engine import VerifyEngine
from services.verifier.feed import FeatureStream


class Reader:
    """A draft worker's end of a stream, without the wire. Keeps every block it has read."""

    def __init__(self, engine: VerifyEngine, limit: int = 1 << 20) -> None:
        self.engine = engine
        self.log: list[FeatureBlock] = []
        self.wants_more = False
        self.woken = 0
        self.stream = FeatureStream(limit_bytes=limit, on_blocks=self._wake, on_room=self._room)

    def _wake(self) -> None:
        self.woken += 1

    def _room(self) -> None:
        self.wants_more = True

    def read(self) -> list[FeatureBlock]:
        """Everything queued, going on as the engine's thread would."""
        read = []
        while True:
            while blocks := self.stream.take():
                read += blocks
            if not self.wants_more:
                self.log += read
                return read
            self.wants_more = False
            self.engine.resume(self.stream)

    def rows(self, key: SequenceKey, size: int) -> torch.Tensor:
        """All blocks of one sequence joined; they must follow each other from 0 on."""
        self.read()
        own = [block for block in self.log if block.key == key and block.error is None]
        position = 0
        for block in own:
            assert block.start == position
            assert len(block.data) == 2 * size * block.count <= 1 << 20
            position += block.count
        data = bytearray(b"".join(block.data for block in own))
        assert data
        return torch.frombuffer(data, dtype=torch.bfloat16).view(-1, size)

    def ids(self, key: SequenceKey, size: int = 0) -> list[int]:
        """The ids behind positions 0, 1, … of one sequence, from all of its blocks, with features of that size."""
        self.read()
        own = [block for block in self.log if block.key == key and block.error is None]
        for before, block in itertools.pairwise([FeatureBlock(key, 0, 0), *own]):
            assert block.start == before.start + before.count
            assert (len(block.token_ids), len(block.data)) == (block.count, 2 * size * block.count)
        return [token_id for block in own for token_id in block.token_ids]

    def errors(self) -> list[DSparkError]:
        """Of what is queued now."""
        return [block.error for block in self.read() if block.error is not None]


def reference(path: Path, ids: list[int], info: TapInfo, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tap's formula on what transformers computes for the whole text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    layers = [states[layer + 1][0] for layer in info.layer_ids]  # entry 0 is the embedding
    if info.normalize_inputs:
        layers = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + info.norm_eps) for x in layers]
    y = torch.cat(layers, -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(()))
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + info.norm_eps) * tensors["hidden_norm.weight"]


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within bfloat16's rounding of the stored value."""
    assert actual.shape == expected.shape
    return torch.allclose(actual.float(), expected, rtol=2**-7, atol=2e-3)
