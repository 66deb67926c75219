"""A block's compiled attention: equal to torch's, and the same bits in any company."""

import pytest
import torch
from support.blocks import Blocks

from dspark.kernels import TORCH, select_kernels, team
from services.draft.kernels import draft_kernels
from services.draft.kernels.attention import BlockPlan

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

CPU = torch.device("cpu")
TORCH_OWN, LLVM_OWN = draft_kernels(TORCH), draft_kernels(select_kernels("llvm", CPU))
LENGTHS = [(0, 0, 1), (5, 0, 7), (63, 2, 1), (64, 0, 33), (700, 0, 5)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 20), (1, 1, 64), (6, 2, 16), (4, 1, 256)])
def test_equal_to_torch(heads: int, kv_heads: int, dim: int, causal: bool) -> None:
    blocks = Blocks(LENGTHS, heads=heads, kv_heads=kv_heads, dim=dim)
    expected, behind = blocks.run(TORCH_OWN, CPU, causal=causal)
    found, behind_too = blocks.run(LLVM_OWN, CPU, causal=causal)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(behind_too, behind, atol=3e-6, rtol=1e-5)


def test_blocks_keep_their_bits_in_company() -> None:
    whole = Blocks([(5, 0, 7), (600, 0, 7), (130, 0, 7)])
    together, _ = whole.run(LLVM_OWN, CPU, causal=False)
    memory = whole.memory(LLVM_OWN, CPU)
    for number, span in enumerate(whole.spans(memory, CPU)):
        rows = slice(7 * number, 7 * number + 7)
        assert torch.equal(whole.attend(LLVM_OWN, memory, [span], rows, causal=False), together[rows])


def test_bfloat16_stays_with_torch() -> None:
    blocks = Blocks(LENGTHS, dtype=torch.bfloat16)
    spans = blocks.spans(blocks.memory(LLVM_OWN, CPU), CPU)
    assert isinstance(LLVM_OWN.plan_block(spans, causal=False, group=2), BlockPlan)
    assert torch.equal(blocks.run(LLVM_OWN, CPU, causal=False)[0], blocks.run(TORCH_OWN, CPU, causal=False)[0])
