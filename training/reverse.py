"""Draft tokens that rejection sampling would have met, given the text that it came to (DSpark §3.2, Leviathan 2023).

Rejection sampling draws a draft x from q and keeps it with probability min(1, p(x) / q(x)), else it emits a token y
from norm(max(0, p - q)): a maximal coupling of x ~ q and y ~ p, under which x stands exactly where x = y. Here y comes
first, from a text that the target wrote, and x is drawn from the coupling's other conditional: x = y with probability
min(1, q(y) / p(y)), else x from norm(max(0, q - p)). Behind the first difference drafts come from q. The joint law of
drafts, confidences and accepted length is then that of decoding itself, and the same texts serve every drafter.

Noise is keyed as the drafter's own, by seed, position and committed length, under streams that no coupled text uses.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._alive = torch.empty(0, dtype=torch.bool)

    def expect(self, texts: Sequence[Observed]) -> None:
        """The texts, in row order, of the blocks to come; each must have its `log_z`."""
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
        if bool(positions[0] == committed[0]):
            self._alive = torch.ones(len(self._texts), dtype=torch.bool, device=positions.device)
        b = len(self._texts)
        texts = [text for text in self._texts for _ in range(len(positions) // b)]
        known = _known(texts, positions)
        likened = self._likened(texts, samplings, positions, committed, known, drawn)
        tokens = self._until_first_difference(likened.view(b, -1), drawn.tokens.view(b, -1), known.view(b, -1))
        return Choice(tokens, _draft_index(tokens, d2t), drawn.distributions)

    def _until_first_difference(self, likened: Tensor, drawn: Tensor, known: Tensor) -> Tensor:
        """Tokens (b · n,): likened to the text up to the first that differs from it, as drawn behind that."""
        columns = []
        for ours, free, theirs in zip(likened.unbind(1), drawn.unbind(1), known.unbind(1), strict=True):
            columns.append(torch.where(self._alive, ours, free))
            self._alive = self._alive & (columns[-1] == theirs)
        return torch.stack(columns, 1).flatten()

    def _likened(
        self,
        texts: Sequence[Observed],
        samplings: Sequence[Sampling],
        positions: Tensor,
        committed: Tensor,
        known: Tensor,
        drawn: Choice,
    ) -> Tensor:
        """Draft tokens (rows,) coupled with the texts' tokens; as drawn behind the texts' ends."""
        tokens, rows = drawn.tokens.clone(), (known >= 0).nonzero().flatten()
        if len(rows):
            at = rows.tolist()
            noise = self._uniforms([samplings[row] for row in at], positions[rows], committed[rows])
            ids, q = _padded([drawn.distributions[row] for row in at], known.device)
            p = _probabilities([texts[row] for row in at], positions[rows], ids)
            tokens[rows] = self._coupled(known[rows], ids, p, q, noise)
        return tokens

    def _uniforms(self, samplings: Sequence[Sampling], positions: Tensor, committed: Tensor) -> Tensor:
        """float64 (b, 2): for whether the text's token is drafted, and for which one is otherwise."""
        seeds = SamplingRows.of(samplings, positions.device).seed
        of = streams(0, Stream.ACCEPT, Stream.RESIDUAL, device=positions.device)
        return uniform(self._noise(seeds, committed[:, None], positions[:, None], of))

    def _coupled(self, known: Tensor, ids: Tensor, p: Tensor, q: Tensor, noise: Tensor) -> Tensor:
        """Draft tokens (b,), given the texts' tokens `known` (b,), from q and p over the support (b, k)."""
        at_known = ids == known[:, None]
        q_known, p_known = (torch.where(at_known, values, 0.0).amax(-1) for values in (q, p))
        stands = noise[:, 0] * p_known < q_known
        other = ids.gather(1, self._otherwise(p, q, noise[:, 1]))[:, 0]
        return torch.where(stands, known, other)

    def _otherwise(self, p: Tensor, q: Tensor, uniforms: Tensor) -> Tensor:
        """Where in the support (b, 1) the draft token lies that is not the text's: drawn from norm(max(0, q - p))."""
        running = (q - p).clamp_min(0.0).cumsum(-1)
        aim = uniforms[:, None] * running[:, -1:]
        return torch.searchsorted(running, aim, right=True).clamp_max(q.shape[1] - 1)


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
    # Rounded as the verifier's logits are.
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
