"""The sequential head, which lets each token of a block know the one before it, and the confidence head (DSpark §3.1).

p_k(v | x_0, x_<k) is proportional to exp(U_k(v) + B_k(v)); a head here gives B_k = W_2 z_k from a latent z_k of rank r.
Parameter names are those of the published checkpoints. Leaves the base logits U_k and the choice to others.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

State = Tensor | None


class MarkovHead(nn.Module):
    """The default: z_k = W_1[x_{k-1}].

    `rows` maps target token ids to rows of W_1 ((vocab,) int64), or None where each token has its own row.
    """

    def __init__(self, rows_of_w1: int, draft_vocab: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.rank = rank
        self.hidden = hidden
        self.rows: Tensor | None
        self.register_buffer("rows", None, persistent=False)
        self.markov_w1 = nn.Embedding(rows_of_w1, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab, bias=False)

    def previous(self, token_ids: Tensor) -> Tensor:
        """W_1[x_{k-1}]: token_ids (…,) target ids -> (…, r)."""
        rows = token_ids if self.rows is None else self.rows[token_ids]
        return cast("Tensor", self.markov_w1(rows))

    def initial_state(self, batch: int) -> State:
        """What `step` is given before the first token."""
        del batch
        return None

    def latent(self, state: State, previous: Tensor, hidden: Tensor) -> tuple[Tensor, State]:
        """z_k and the next state from W_1[x_{k-1}] (b, r) and h_k (b, d)."""
        del hidden
        return previous, state

    def step(self, state: State, token_ids: Tensor, hidden: Tensor) -> tuple[Tensor, State]:
        """B_k (b, draft vocabulary) and the next state, from x_{k-1} (b,) as target ids and h_k (b, d)."""
        latent, state = self.latent(state, self.previous(token_ids), hidden)
        return self.markov_w2(latent), state

    def unroll(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """z_1 … z_n (b, n, r) of whole blocks whose tokens x_0 … x_{n-1} (b, n) are known; hidden is (b, n, d)."""
        previous = self.previous(token_ids)
        state, latents = self.initial_state(len(token_ids)), []
        for k in range(token_ids.shape[1]):
            latent, state = self.latent(state, previous[:, k], hidden[:, k])
            latents.append(latent)
        return torch.stack(latents, 1)


class GatedMarkovHead(MarkovHead):
    """z_k = sigmoid(W_g [h_k; W_1[x_{k-1}]]) ⊙ W_1[x_{k-1}]."""

    def __init__(self, rows_of_w1: int, draft_vocab: int, rank: int, hidden: int) -> None:
        super().__init__(rows_of_w1, draft_vocab, rank, hidden)
        self.gate_proj = nn.Linear(hidden + rank, rank)

    def latent(self, state: State, previous: Tensor, hidden: Tensor) -> tuple[Tensor, State]:
        """z_k; stateless."""
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], -1)))
        return gate * previous, state


class RnnHead(MarkovHead):
    """A recurrent state s carries the block so far.

    With z = [s_{k-1}; W_1[x_{k-1}]; h_k]: z_k = tanh(W_o z) and s_k = g ⊙ s_{k-1} + (1 - g) ⊙ tanh(W_c z), where
    g = sigmoid(W_g z).
    """

    def __init__(self, rows_of_w1: int, draft_vocab: int, rank: int, hidden: int) -> None:
        super().__init__(rows_of_w1, draft_vocab, rank, hidden)
        self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def initial_state(self, batch: int) -> State:
        """s_0 = 0, (b, r)."""
        weight = self.markov_w1.weight
        return torch.zeros(batch, self.rank, dtype=weight.dtype, device=weight.device)

    def latent(self, state: State, previous: Tensor, hidden: Tensor) -> tuple[Tensor, State]:
        """z_k and s_k."""
        assert state is not None
        joint = self.joint_proj(torch.cat([state, previous, hidden], -1))
        gate, candidate, output = joint.chunk(3, -1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w^T [h_k; W_1[x_{k-1}]] + b), or of h_k alone where `rank` is 0."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden + rank, 1)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Logits (…,) from h_k (…, d) and W_1[x_{k-1}] (…, r)."""
        inputs = hidden if self.proj.in_features == hidden.shape[-1] else torch.cat([hidden, previous], -1)
        return cast("Tensor", self.proj(inputs)).squeeze(-1)


HEADS: dict[str, type[MarkovHead]] = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RnnHead}
