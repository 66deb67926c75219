"""Exact draws from processed distributions with keyed noise.

Coupled choice (Daliri, Musco, Suresh, arXiv 2408.07978): argmax over tokens of log p + G, with Gumbel noise G keyed by
seed, position and token, so that a drafter with the same noise mostly makes the same choice, and the choice is a
function of the target's distribution and the key alone. Noise for every token of a large vocabulary is not needed: the
maximum over all tokens outside the head is itself Gumbel, located at their log-sum-exp, so one number stands for them;
only where it wins is a token drawn among them, in proportion to their weights.
"""

from __future__ import annotations

import torch

from dspark.kernels.noise import KeyedBits, Stream, gumbel, keyed_bits, streams, uniform
from dspark.sampling.order import BLOCK
from dspark.sampling.processed import Law

__all__ = ["choose", "pick"]


def choose(law: Law, seeds: torch.Tensor, positions: torch.Tensor, bits: KeyedBits = keyed_bits) -> torch.Tensor:
    """One token a row from its law, keyed by TOKEN, REST and REST_PICK noise.

    Args:
        law: laws of the rows.
        seeds: int64 bit patterns (rows, 1).
        positions: int64 (rows, 1), of the token being chosen.
        bits: the noise generator.

    Returns:
        int64 (rows,) token ids.
    """
    size = law.ids.shape[1]
    extra = law.ids.new_zeros(len(law.ids), 2)
    of = streams(size, Stream.REST, Stream.REST_PICK, device=seeds.device)
    drawn = bits(seeds, torch.cat((law.ids, extra), 1), positions, of)
    scores = torch.cat((law.log_weights, law.rest.log()), 1) + gumbel(drawn[:, :-1])
    winner = scores.argmax(-1)
    tokens = law.ids.gather(1, winner.clamp(max=size - 1).unsqueeze(-1)).squeeze(-1)
    rest = (winner == size).nonzero().flatten()
    if len(rest):
        tokens[rest] = pick(law.rest_weights, law.rest_sums[rest], rest, uniform(drawn[rest, -1]))
    return tokens


def pick(weights: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution in the order of token ids, for a few rows.

    Args:
        weights: float32 (all rows, width), width a multiple of `BLOCK`.
        sums: float64 (n, blocks), running sums over blocks for the rows picked from; totals are positive.
        rows: int64 (n,), which rows of `weights` these are.
        uniforms: float64 (n,) in (0, 1).

    Returns:
        int64 (n,) token ids, always of positive weight.
    """
    aim = _below(uniforms.unsqueeze(-1) * sums[:, -1:], sums[:, -1:])
    block = torch.searchsorted(sums, aim, right=True)
    ends = sums.gather(1, block)
    starts = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inner = weights.view(len(weights), -1, BLOCK)[rows, block.squeeze(-1)].double().cumsum(-1)
    # The block's own sum may differ in the last bit from the one in `sums`: go on as a fraction of it.
    aim = _below((aim - starts) / (ends - starts) * inner[:, -1:], inner[:, -1:])
    return (block * BLOCK + torch.searchsorted(inner, aim, right=True)).squeeze(-1)


def _below(value: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))
