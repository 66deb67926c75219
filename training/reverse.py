"""Draft tokens that rejection of whole blocks would have met, given the text that it came to (DSpark §3.2).

Decoding draws a block x from q and lets its first tokens stand or fall as `services.verifier.trial` says; behind them
comes a token of the target's. Here a text y that the target wrote comes first, and the block is drawn from what
decoding would have drafted on the way to it. There i tokens or more of the text were drafted and stood with probability

    s_i = min over j <= i of min(1, q(y_1 … y_j) / p(y_1 … y_j))

so one number a round says how many; the next draft is another one, from norm(max(0, q - w_i p)), w_i = s_i p / q. The
joint law of accepted length, drafts up to the first that falls, and confidences up to the one behind it is then that of
decoding itself, and the same texts serve every drafter. Later drafts, which nothing can come of, are drawn from q: in
decoding they lean a little away from p, but what the target makes of them no text tells.

Noise is keyed as the drafter's own, by seed, position and committed length, under streams that no coupled text uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.noise import KeyedBits, Stream, keyed_bits, streams, uniform
from dspark.messages import Sampling, SparseDistribution
from dspark.sampling import DraftChooser
from dspark.sampling.draft import Choice
from dspark.sampling.rows import SamplingRows
from training.texts import Observed

__all__ = ["ReverseChooser"]


class ReverseChooser(DraftChooser):
    """A chooser for rejection mode that knows how each text goes on. For one engine on one thread.

    `expect` says which texts the rows of the next blocks are. Temperature is the text's own; filters are off.
    """

    def __init__(self, *, draft_top_k: int = 64, bits: KeyedBits = keyed_bits) -> None:
        super().__init__(draft_top_k=draft_top_k, bits=bits)
        self._noise = bits
        self._texts: Sequence[Observed] = ()
        self._blocks = _Blocks.begun(0, torch.device("cpu"))

    def expect(self, texts: Sequence[Observed]) -> None:
        """The texts, in row order, of the blocks to come; each must have its `log_z` and a token of its response."""
        self._texts = texts

    @torch.no_grad()
    def choose(
        self,
        logits: Tensor,
        samplings: Sequence[Sampling],
        positions: Tensor,
        d2t: Tensor | None = None,
        *,
        committed: Tensor | None = None,
    ) -> Choice:
        """As `DraftChooser.choose`, for one token of every block, or for whole blocks one after another.

        The first token of a block begins at the committed length, and a block's tokens come in order.
        """
        assert committed is not None
        drawn = super().choose(logits, samplings, positions, d2t, committed=committed)
        b = len(self._texts)
        if bool(positions[0] == committed[0]):
            self._blocks = _Blocks.begun(b, positions.device)
        n = len(positions) // b
        texts = [text for text in self._texts for _ in range(n)]
        known = _known(texts, positions)
        ids, q = _padded(drawn.distributions, positions.device)
        p = _probabilities(texts, positions.where(known >= 0, committed - 1), ids)
        stand, place = self._noises(samplings, positions, committed)
        columns = (column.view(b, n, *column.shape[1:]).unbind(1) for column in (known, drawn.tokens, ids, p, q, place))
        stands_below = stand.view(b, n)[:, 0]
        tokens = torch.stack([self._next(stands_below, *column) for column in zip(*columns, strict=True)], 1).flatten()
        return Choice(tokens, _draft_index(tokens, d2t), drawn.distributions, tokens)

    def _next(
        self, chance: Tensor, known: Tensor, free: Tensor, ids: Tensor, p: Tensor, q: Tensor, place: Tensor
    ) -> Tensor:
        """The blocks' next tokens (b,): the texts', or the first that falls, or as drawn behind that."""
        blocks, at_known = self._blocks, ids == known[:, None]
        q_known, p_known = (torch.where(at_known, values, 0.0).amax(-1) for values in (q, p))
        ratio = torch.where(q_known > 0.0, blocks.ratio * q_known / p_known, 0.0)
        least = torch.minimum(blocks.least, ratio)
        stands = blocks.alive & (chance < least)
        kept = torch.where(blocks.alive, blocks.least / blocks.ratio, 1.0)
        other = ids.gather(1, self._otherwise(p * kept[:, None], q, place))[:, 0]
        falls = blocks.alive & (known >= 0)
        self._blocks = _Blocks(stands, ratio, least)
        return torch.where(stands, known, torch.where(falls, other, free))

    def _noises(self, samplings: Sequence[Sampling], positions: Tensor, committed: Tensor) -> tuple[Tensor, Tensor]:
        """float64 (rows,) each: the round's, for how many tokens stand, and the position's, for which one falls."""
        seeds = SamplingRows.of(samplings, positions.device).seed
        at = torch.stack((committed, positions), 1)
        of = streams(0, Stream.ACCEPT, Stream.RESIDUAL, device=positions.device)
        stand, place = uniform(self._noise(seeds, committed[:, None], at, of)).unbind(1)
        return stand, place

    def _otherwise(self, p: Tensor, q: Tensor, uniforms: Tensor) -> Tensor:
        """Where in the support (b, 1) a draft token lies that falls: drawn from norm(max(0, q - p)), `p` being w p."""
        running = (q - p).clamp_min(0.0).cumsum(-1)
        aim = uniforms[:, None] * running[:, -1:]
        return torch.searchsorted(running, aim, right=True).clamp_max(q.shape[1] - 1)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How far blocks have come, (b,) each: whether all tokens stand, q / p of these, and the least s."""

    alive: Tensor
    ratio: Tensor
    least: Tensor

    @classmethod
    def begun(cls, count: int, device: torch.device) -> _Blocks:
        one = torch.ones(count, dtype=torch.float64, device=device)
        return cls(one.bool(), one, one)


def _known(texts: Sequence[Observed], positions: Tensor) -> Tensor:
    """The texts' tokens at some positions, -1 behind their ends."""
    pairs = zip(texts, positions.tolist(), strict=True)
    return positions.new_tensor([one.text.token_ids[at] if at < len(one.text) else -1 for one, at in pairs])


def _padded(distributions: Sequence[SparseDistribution | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 and probabilities float64 (b, longest); short rows go on with probability 0 of their first token."""
    known = [one for one in distributions if one is not None]
    assert len(known) == len(distributions)
    longest = max(len(one.token_ids) for one in known)
    ids = [[*one.token_ids, *one.token_ids[:1] * (longest - len(one.token_ids))] for one in known]
    shares = [[*one.probabilities, *(0.0,) * (longest - len(one.token_ids))] for one in known]
    q = torch.tensor(shares, dtype=torch.float64, device=device)
    return torch.tensor(ids, device=device), q / q.sum(-1, keepdim=True)


def _probabilities(texts: Sequence[Observed], positions: Tensor, ids: Tensor) -> Tensor:
    """float64 (b, k): the target's probabilities of some tokens (b, k) at each text's position (b,)."""
    places = [(one, at - one.text.prompt_length) for one, at in zip(texts, positions.tolist(), strict=True)]
    hidden = torch.stack([one.hidden[at] for one, at in places])
    head = texts[0].head
    # Rounded as logits of a model whose tensors are bfloat16.
    logits = (head[ids].float() @ hidden.float()[..., None])[..., 0].to(head.dtype).double()
    log_z = torch.stack([one.log_z[at] for one, at in places if one.log_z is not None])
    temperatures = log_z.new_tensor([one.text.temperature for one in texts])
    return (logits / temperatures[:, None] - log_z[:, None]).exp()


def _draft_index(tokens: Tensor, d2t: Tensor | None) -> Tensor:
    """Places in the draft vocabulary, whose target ids ascend."""
    if d2t is None:
        return tokens
    ids = torch.arange(len(d2t), device=d2t.device) + d2t
    return torch.searchsorted(ids, tokens)
