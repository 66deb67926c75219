"""The target's choice at a row whose logits are known by bounds: the law, and its reference in torch.

Coupled sampling gives tokens noise and takes the greatest sum of log weight and noise (`dspark.sampling.choice`). Here
what is known of all tokens is a bound on their logits (`dspark.kernels.screen`); a logit itself is looked up where it
may decide. Which tokens have noise of their own, the head, goes by bounds; it may be any set that depends on the row
alone. A token of the head is looked up if its bound and noise together are greater than the best that was found.

All others are a race. Times at which tokens of rates w arrive first are those of one process of the summed rate whose
arrivals are tokens in proportion to w; and with rates that are too great, those of the bounds, it stays the same where
an arrival is taken with a chance of w over its bound, and the next one awaited where it is not (thinning: Lewis and
Shedler 1979). An arrival at time t has the score -log t, as a token of weight w and Gumbel noise G has log w + G. So
the choice has exactly the target's distribution, and depends on the row and the key alone.

Rates need be no nearer than what they save: of the many blocks of tokens with low bounds, each token has the greatest
bound of its block for its own, so that a row's bounds are mostly not looked at one by one (`loosened`).

Rows on which arrivals would not end, flat ones at low temperatures, are left undecided: all of their logits are wanted,
and the choice is `dspark.sampling.choice.choose`'s. Which rows are is a matter of the row and its temperature only, not
of noise, so that nothing is chosen twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from dspark.kernels.logits import BLOCK
from dspark.kernels.noise import KeyedBits, Stream, gumbel, keyed_bits, uniform
from dspark.sampling.choice import pick
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import Law, process
from dspark.sampling.rows import SamplingRows

__all__ = [
    "MOST_ARRIVALS",
    "MOST_BELOW",
    "MOST_LOOKED_UP",
    "OUT_OF_REACH",
    "choose",
    "greatest",
    "high_blocks",
    "loosened",
]

MOST_ARRIVALS = 512.0
"""Tokens outside the head may weigh so many times the head by bounds, the head taken to lie as far below its own as the
token of the greatest bound does. About so many arrivals are awaited on such a row, on average, at most."""
MOST_BELOW = 28.0
"""Temperatures that this token may lie below its bound: weights outside the head are 0 from 73 below the bound on."""
OUT_OF_REACH = 45.0
"""Temperatures below this token, from which on bounds are of no account: all such tokens together weigh e^-32 of it."""
MOST_LOOKED_UP = 4096
"""Logits of a row looked up for its greatest; all of them at once are cheaper then."""
_HIGH = 8  # one block in so many keeps the bounds of its tokens

Exact = Callable[[int], float]
"""A token's logit."""


def greatest(bounds: torch.Tensor, exact: Exact) -> int:
    """The token of the greatest logit, the lowest of equal ones, from bounds (vocabulary,)."""
    first = int(bounds.argmax())
    best, token = exact(first), first
    for other in (bounds >= best).nonzero().flatten().tolist():
        if other != first and bounds[other] >= best and (exact(other), -other) > (best, -token):
            best, token = exact(other), other
    return token


def high_blocks(blocks: int, size: int) -> int:
    """How many of a row's blocks keep the bounds of their tokens, those among them that a head of `size` lies in."""
    return max(size, blocks // _HIGH)


def loosened(bounds: torch.Tensor, size: int) -> torch.Tensor:
    """Bounds (1, vocabulary) with the greatest of a block for all of its tokens, where blocks are low.

    Blocks below the `high_blocks` greatest are, but for the last, which may have fewer tokens. The head stays the same.
    """
    width = bounds.shape[1]
    blocks = functional.pad(bounds, (0, -width % BLOCK), value=-torch.inf).view(-1, BLOCK)
    peaks = blocks.amax(1)
    if (high := high_blocks(len(blocks), size)) >= len(blocks):
        return bounds
    low = peaks < peaks.topk(high).values[-1]
    low[-1] = False
    return torch.where(low[:, None], peaks[:, None], blocks).view(1, -1)[:, :width]


def choose(
    bounds: torch.Tensor, exact: Exact, rows: SamplingRows, position: int, size: int, bits: KeyedBits = keyed_bits
) -> int | None:
    """One token by its law, without filters.

    Args:
        bounds: float32 (1, vocabulary), no logit above its own.
        exact: logits.
        rows: the row's settings.
        position: of the token being chosen.
        size: length of the head.
        bits: the noise generator.

    Returns:
        The token; None where all logits are wanted.
    """
    bounds = loosened(bounds, min(size, bounds.shape[1]))
    law = process(LogitRows.of(bounds, [0]), rows, min(size, bounds.shape[1]))
    race = _Race(law, bounds[0], exact, float(rows.temperature), lambda n, of: bits(rows.seed, n, _at(position), of))
    return race.winner()


def _at(position: int) -> torch.Tensor:
    return torch.tensor([[position]])


class _Race:
    """One row's tokens on their way."""

    def __init__(
        self,
        law: Law,
        bounds: torch.Tensor,
        exact: Exact,
        temperature: float,
        bits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        self._law, self._bounds, self._exact, self._temperature, self._bits = law, bounds, exact, temperature, bits

    def winner(self) -> int | None:
        law = self._law
        top, edge = float(self._difference(int(law.ids[0, 0]))), float(law.log_weights[0, -1])
        few = float(law.rest) <= MOST_ARRIVALS * math.exp(top) * float(law.head)
        if not (edge <= top - OUT_OF_REACH or (top >= -MOST_BELOW and few)):
            return None
        ids = law.ids[0]
        noise = gumbel(self._bits(law.ids, torch.tensor(int(Stream.TOKEN))))[0]
        scores = law.log_weights[0] + noise + torch.stack([self._difference(int(token)) for token in ids])
        front = int(scores.argmax())
        arrived = self._arrived(float(scores[front]))
        return int(ids[front]) if arrived is None else arrived

    def _arrived(self, best: float) -> int | None:
        """The first of the others that is taken, if it comes before the head's best."""
        since, arrival = torch.zeros((), dtype=torch.float64), 0
        while True:
            since = since - self._uniform(arrival, Stream.REST).log()
            if not float(self._law.rest.log() - since.log()) > best:
                return None
            token = self._picked(self._uniform(arrival, Stream.REST_PICK))
            if float(self._uniform(arrival, Stream.REST_KEEP)) < float(self._difference(token).exp()):
                return token
            arrival += 1

    def _picked(self, chance: torch.Tensor) -> int:
        law = self._law
        return int(pick(law.rest_weights, law.rest_sums, torch.zeros(1, dtype=torch.int64), chance.view(1)))

    def _uniform(self, item: int, stream: Stream) -> torch.Tensor:
        return uniform(self._bits(torch.tensor([[item]]), torch.tensor(int(stream))))[0, 0]

    def _difference(self, token: int) -> torch.Tensor:
        """A logit less its bound, float64, in units of the temperature."""
        difference = torch.tensor(self._exact(token), dtype=torch.float64) - self._bounds[token].double()
        return difference / self._temperature
