"""The sequential head on a processor: after each product with W_2 one pass of compiled code chooses the tokens.

The pass adds bias to base logits, finds the tokens worth looking at, draws their noise and chooses: what takes some
forty operations of torch a token. Which tokens are looked at is decided by a bound below the best one, narrowed until
few enough lie above it. In rejection mode what was drawn from is shipped, so that the verifier's law holds whatever was
left out.

Rows that are filtered, and all that is not float32, are the reference's: see `sequential`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.kernels import team
from dspark.kernels.linear_llvm import Streamed
from dspark.kernels.noise import signed_seed
from dspark.kernels.parts_llvm import host_lanes
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.models.drafters.heads import MarkovHead
from services.draft.drafting import Drafted
from services.draft.kernels import sequential
from services.draft.kernels.choice_llvm import COUPLED, GREEDY, REJECTION, ChoiceArguments, compiled
from services.draft.kernels.sequence_llvm import Along, Found, Shape
from services.draft.kernels.sequential import SequentialHead, unrolled

__all__ = ["draft_tokens"]

_MOST_SHAPES = 64  # laid out, of some kilobytes a block and token each
_MANY = 4  # rows, from which on a team is told


@torch.inference_mode()
def draft_tokens(
    own: SequentialHead,
    base: Tensor,
    hidden: Tensor,
    anchors: Sequence[int],
    committed_lens: Sequence[int],
    samplings: Sequence[Sampling],
) -> Drafted:
    """As `sequential.draft_tokens`."""
    if (
        base.dtype != torch.float32
        or base.shape[2] % host_lanes()
        or any(one.filtered and not one.greedy for one in samplings)
    ):
        return sequential.draft_tokens(own, base, hidden, anchors, committed_lens, samplings)
    rows = [(signed_seed(s.seed), n, n, _kind(s)) for s, n in zip(samplings, committed_lens, strict=True)]
    if _stateless(own):
        return _at_once(own, base, hidden, anchors, rows, samplings)
    choosing = _Choosing(own, torch.tensor(rows), torch.tensor([s.temperature for s in samplings], dtype=torch.float64))
    tokens, confidence_logits = unrolled(own, hidden, anchors, lambda k, bias: choosing.next(base[:, k], bias.float()))
    return Drafted(
        tokens=tokens,
        distributions=choosing.distributions,
        confidence_logits=confidence_logits,
        others=torch.stack(choosing.others, 1),
        logits=choosing.logits,
        chosen=choosing.chosen,
    )


def _stateless(own: SequentialHead) -> bool:
    """Whether a block's tokens can be found in one call."""
    plain = type(own.head) is MarkovHead and isinstance(own.bias, Streamed)
    table = own.head.markov_w1.weight
    return plain and table.dtype == torch.float32 and table.is_contiguous() and table.shape[1] % host_lanes() == 0


def _at_once(
    own: SequentialHead,
    base: Tensor,
    hidden: Tensor,
    anchors: Sequence[int],
    rows: Sequence[tuple[int, int, int, int]],
    samplings: Sequence[Sampling],
) -> Drafted:
    """All tokens of all blocks by `sequence_llvm`; `rows` as in `ChoiceArguments`, at the first position."""
    base = base.contiguous()
    blocks, count, width = base.shape
    along = _along(own, Shape(blocks, count, width, own.chooser.top_k))
    found = along(base, anchors, rows, [sampling.temperature for sampling in samplings])
    parts = found.tokens, found.others, found.logits, found.chosen, found.latents
    tokens, others, logits, chosen, latents = map(torch.from_numpy, parts)
    return Drafted(
        tokens=tokens[:, 1:],
        distributions=_shipped(own, found, rows),
        confidence_logits=None if own.confidence is None else own.confidence.logits(hidden, latents),
        others=others,
        logits=logits.unbind(1),
        chosen=chosen.unbind(1),
    )


def _along(own: SequentialHead, shape: Shape) -> Along:
    """What was laid out for such blocks."""
    along = own.remembered.get(shape)
    if along is None:
        if len(own.remembered) >= _MOST_SHAPES:
            own.remembered.clear()
        assert isinstance(own.bias, Streamed)
        along = Along(own.bias, own.head.markov_w1.weight, own.head.rows, own.d2t, shape)
        own.remembered[shape] = along
    return along


def _shipped(
    own: SequentialHead, found: Found, rows: Sequence[tuple[int, int, int, int]]
) -> list[list[SparseDistribution | None]]:
    """What tokens were drawn from, token by token."""
    count = found.chosen.shape[1]
    kinds = [kind for *_, kind in rows]
    if REJECTION not in kinds:
        return [[None] * len(rows)] * count
    shipping = _Shipping(own.d2t, kinds)
    parts = [torch.from_numpy(part).unbind(1) for part in (found.places, found.weights, found.counts)]
    return [shipping.of(*token) for token in zip(*parts, strict=True)]


def _kind(sampling: Sampling) -> int:
    if sampling.greedy:
        return GREEDY
    return REJECTION if sampling.mode is Mode.REJECTION else COUPLED


class _Choosing:
    """A block's choices, left to right. `rows` (b, 4) are as in `ChoiceArguments`, at the block's first position."""

    def __init__(self, own: SequentialHead, rows: Tensor, temperatures: Tensor) -> None:
        self._d2t = own.d2t
        self._rows, self._temperatures = rows, temperatures
        self._most = own.chooser.top_k
        self._shipping = _Shipping(own.d2t, rows[:, 3].tolist())
        self.logits: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self.others: list[Tensor] = []
        self.distributions: list[list[SparseDistribution | None]] = []

    def next(self, base: Tensor, bias: Tensor) -> Tensor:
        """The next tokens (b,), of base logits and biases (b, V)."""
        assert base.dtype == bias.dtype == torch.float32
        assert base.stride(1) == bias.stride(1) == 1
        (count, width), most = base.shape, self._most
        logits = torch.empty(count, width)
        chosen, tokens, others, counts = torch.empty(4, count, dtype=torch.int64).unbind()
        places = torch.empty(count, most, dtype=torch.int64)
        weights = torch.empty(count, most, dtype=torch.float64)
        out = (t.data_ptr() for t in (logits, chosen, tokens, others, counts, places, weights))
        arguments = ChoiceArguments(
            base.data_ptr(), base.stride(0), bias.data_ptr(), bias.stride(0), width,
            0 if self._d2t is None else self._d2t.data_ptr(), self._rows.data_ptr(), self._temperatures.data_ptr(),
            most, *out, count, 0,
        )  # fmt: skip
        (team.run if count >= _MANY else team.alone)(compiled(), arguments)
        self._rows[:, 1] += 1
        self.logits.append(logits)
        self.chosen.append(chosen)
        self.others.append(others)
        self.distributions.append(self._shipping.of(places, weights, counts))
        return tokens


class _Shipping:
    """What tokens were drawn from, of blocks by rejection."""

    def __init__(self, d2t: Tensor | None, kinds: Sequence[int]) -> None:
        """`kinds`: of the blocks."""
        self._d2t, self._by_rejection = d2t, [kind == REJECTION for kind in kinds]

    def of(self, places: Tensor, weights: Tensor, counts: Tensor) -> list[SparseDistribution | None]:
        """Of one token a block: (b, most), (b, most) and (b,)."""
        if not any(self._by_rejection):
            return [None] * len(places)
        return [
            self._distribution(places[row, :count], weights[row, :count]) if wanted else None
            for row, (count, wanted) in enumerate(zip(counts.tolist(), self._by_rejection, strict=True))
        ]

    def _distribution(self, places: Tensor, weights: Tensor) -> SparseDistribution:
        ids = places if self._d2t is None else places + self._d2t[places]
        return SparseDistribution(tuple(ids.tolist()), tuple((weights / weights.sum()).tolist()))
