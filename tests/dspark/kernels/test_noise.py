"""Keyed noise equals its specification."""

import numpy as np
import pytest
import scipy.stats
import torch

from dspark.kernels import team
from dspark.kernels.noise import Stream, gumbel, keyed_bits, philox4x32, signed_seed, streams, uniform

# Known answers of the authors' library Random123 for philox4x32-10: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The algorithm once more in plain integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter: str, key: str, output: str) -> None:
    low, high = words(key)
    seed = torch.tensor([signed_seed(low | high << 32)])
    drawn = philox4x32(seed, tuple(torch.tensor([word]) for word in words(counter)))
    assert [int(word) for word in drawn] == words(output) == scalar_philox(words(counter), words(key))


def test_the_counter_is_item_position_stream_and_the_key_is_the_seed() -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    items, positions = torch.tensor([[0, 7, 262_143, 2**32 - 1]]), torch.tensor([[0], [1], [9], [131_071], [2**31]])
    drawn = keyed_bits(torch.tensor([[signed_seed(s)] for s in seeds]), items, positions, torch.tensor(Stream.DRAFT))
    expected = [
        [
            scalar_philox([item, position, Stream.DRAFT, 0], [seed & 0xFFFFFFFF, seed >> 32])[0]
            for item in items[0].tolist()
        ]
        for seed, position in zip(seeds, positions.flatten().tolist(), strict=True)
    ]
    assert drawn.tolist() == expected


def test_a_row_of_streams() -> None:
    assert streams(2, Stream.REST, Stream.DRAFT, device=torch.device("cpu")).tolist() == [0, 0, 1, 3]
    assert len(set(Stream)) == 7


def test_uniform_stays_inside_and_gumbel_is_finite() -> None:
    ends = torch.tensor([0, 2**32 - 1])
    low, high = uniform(ends).tolist()
    assert (low, high) == (2.0**-33, 1.0 - 2.0**-33)
    assert np.allclose(gumbel(ends).tolist(), [-np.log(-np.log(low)), -np.log(-np.log(high))])


@pytest.mark.parametrize("moving", ["seed", "item", "position"])
def test_numbers_along_each_key_part_are_independent_and_uniform(moving: str) -> None:
    at = torch.arange(20_000)
    parts = {name: at if name == moving else torch.zeros_like(at) for name in ("seed", "item", "position")}
    drawn = uniform(keyed_bits(parts["seed"], parts["item"], parts["position"], torch.zeros_like(at))).numpy()
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03


@pytest.mark.skipif(not team.available(), reason="this torch has no OpenMP that can be called")
@pytest.mark.parametrize("rows", [1, 5, 40])  # alone, and by a team
def test_compiled_bits_are_the_same(rows: int) -> None:
    compiled = pytest.importorskip("dspark.kernels.noise_llvm").keyed_bits
    generator = torch.Generator().manual_seed(rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows, 1), generator=generator)
    items = torch.randint(0, 2**32, (rows, 257), generator=generator)
    items[0, :3] = torch.tensor([0, 1, 2**32 - 1])
    positions = torch.randint(0, 2**31, (rows, 1), generator=generator)
    for of in (torch.tensor(int(Stream.TOKEN)), torch.arange(257) % 7):
        assert torch.equal(compiled(seeds, items, positions, of), keyed_bits(seeds, items, positions, of))
