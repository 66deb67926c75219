"""Keyed noise: the counter-based random numbers that a drafter and its target share.

This is the specification, and the reference that every other implementation must equal bit for bit.

Generator: Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

- key: the request's 64-bit seed, low word first: `(seed & 0xffffffff, seed >> 32)`;
- counter: `(item, position, stream, 0)`, each 32 bits: `position` is the position of the token being chosen, `stream`
  says what the number is for (`Stream`), `item` tells apart the numbers of one stream and position;
- of the four output words only word 0 is used.

From bits to numbers, in float64: uniform `u = (bits + 0.5) / 2**32`, so never 0 or 1; Gumbel `-log(-log(u))`.

Bits are carried in int64 tensors with values in [0, 2**32); seeds are int64 tensors that hold the 64-bit pattern.
`dspark.kernels.noise_triton` computes the same bits on a GPU. What the numbers decide is left to `dspark.sampling`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import lru_cache
from itertools import zip_longest

import torch

__all__ = ["KeyedBits", "Stream", "gumbel", "keyed_bits", "philox4x32", "signed_seed", "streams", "uniform"]

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

KeyedBits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`keyed_bits` or another implementation of it: (seeds, items, positions, streams) -> bits."""


class Stream(enum.IntEnum):
    """What a number is for: third counter word. `item` is the token id for TOKEN, see each for the others."""

    TOKEN = 0
    """Gumbel of one token (item: target token id). Shared by drafter and target: the coupling itself."""
    REST = 1
    """Gumbel of all tokens outside the target's candidates taken as one (item 0), or how long an arrival of theirs is
    awaited (item: arrival)."""
    REST_PICK = 2
    """Uniform that picks inside the rest once it has won (item: arrival)."""
    DRAFT = 3
    """Uniform from which a drafter samples in rejection mode (item: the round's committed length)."""
    ACCEPT = 4
    """Uniform of the acceptance test (item: the round's committed length)."""
    RESIDUAL = 5
    """Uniform that picks from the residual after a rejection (item: the round's committed length)."""
    REST_KEEP = 6
    """Uniform by which an arrival of the rest is taken (item: arrival)."""


def signed_seed(seed: int) -> int:
    """The int64 value with the bit pattern of an unsigned 64-bit seed."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def philox4x32(seeds: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four words of Philox-4x32-10 for every element.

    Args:
        seeds: int64 bit patterns, broadcastable to the counters' common shape.
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).

    Returns:
        Four int64 tensors of the common shape, values in [0, 2**32).
    """
    shape = common_shape(seeds, *counter)
    c0, c1, c2, c3 = (c.expand(shape) for c in counter)
    even, odd = torch.stack((c0, c2)), torch.stack((c1, c3))
    multiplier, schedule = _constants(len(shape), seeds.device)
    keys = torch.stack((seeds, seeds >> 32)).view(2, *[1] * (len(shape) - seeds.dim()), *seeds.shape)
    for key in (schedule + keys).unbind(0):
        # Products wrap modulo 2**64 and may turn negative: only the mask after the xor makes words of them again,
        # so that a round takes six operations.
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK)
        odd = product
    odd = odd & MASK
    return even[0], odd[0], even[1], odd[1]


def common_shape(*tensors: torch.Tensor) -> tuple[int, ...]:
    """The shape that tensors broadcast to (none of them empty)."""
    backwards = zip_longest(*(t.shape[::-1] for t in tensors), fillvalue=1)
    return tuple(max(sizes) for sizes in backwards)[::-1]


@lru_cache(maxsize=16)
def _constants(dims: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The two multipliers, and what the rounds add to the key, shaped for `dims` dimensions after the pair's own."""
    lead = (2, *[1] * dims)
    schedule = [[w * i for w in WEYL] for i in range(ROUNDS)]
    with torch.inference_mode(False):
        multiplier = torch.tensor(MULTIPLIERS, device=device).view(lead)
        return multiplier, torch.tensor(schedule, device=device).view(ROUNDS, *lead)


def keyed_bits(
    seeds: torch.Tensor, items: torch.Tensor, positions: torch.Tensor, streams: torch.Tensor
) -> torch.Tensor:
    """Word 0 for counter (item, position, stream, 0) under each seed.

    Args:
        seeds: int64 bit patterns; all four arguments broadcast against each other.
        items: int64 in [0, 2**32); for `Stream.TOKEN` target token ids.
        positions: int64, position of the token being chosen.
        streams: int64 values of `Stream`.

    Returns:
        int64 tensor of the common shape, values in [0, 2**32).
    """
    return philox4x32(seeds, (items, positions, streams, torch.zeros_like(positions)))[0]


@lru_cache(maxsize=64)
def streams(tokens: int, *others: Stream, device: torch.device) -> torch.Tensor:
    """int64 (tokens + others,): the streams of one row, `tokens` times TOKEN and then the others. Not to be changed."""
    with torch.inference_mode(False):
        return torch.tensor([0] * tokens + [int(stream) for stream in others], device=device)


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1) from 32 random bits."""
    return (bits.double() + 0.5) * 2.0**-32


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """float64 standard Gumbel from 32 random bits; lies in [-3.14, 22.88]."""
    return uniform(bits).log_().neg_().log_().neg_()
