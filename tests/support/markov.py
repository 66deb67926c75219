"""A small world in which exactness can be counted: Markov chains as target and drafter, many requests in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.stats
import torch

from dspark.messages import Sampling, SparseDistribution
from dspark.sampling import DraftChooser
from services.verifier.candidates import Candidate, Outcome
from services.verifier.verification import EXACT, AcceptanceRules, verify

Lengths = Callable[[int, np.ndarray], np.ndarray]
"""(round, the last round's drafts (n, block), -1 before the first) -> verify lengths (n,)."""


@dataclass(frozen=True)
class World:
    """Next-token logits by previous token: target (V, V), drafter (V, Vd); token 0 starts every sequence."""

    target: torch.Tensor
    drafter: torch.Tensor
    d2t: torch.Tensor | None = None

    @staticmethod
    def random(seed: int, vocab: int, *, apart: float = 1.0, reduced: Sequence[int] | None = None) -> "World":
        """A random chain, and a drafter that is `apart` from it, over the tokens `reduced` where given."""
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(vocab, vocab, generator=generator)
        drafter = target + apart * torch.randn(vocab, vocab, generator=generator)
        if reduced is None:
            return World(target, drafter)
        kept = torch.tensor(reduced)
        return World(target, drafter[:, kept], kept - torch.arange(len(kept)))


@dataclass
class Run:
    """Tokens (n, length) of n requests, and what speculation did for them."""

    tokens: np.ndarray
    verified: int = 0
    accepted: int = 0
    rejected: int = 0
    rounds: int = 0


def generate(
    world: World,
    samplings: Sequence[Sampling],
    length: int,
    *,
    block: int = 4,
    lengths: Lengths | None = None,
    plan: Callable[[np.ndarray], np.ndarray] | None = None,
    chooser: DraftChooser | None = None,
    rules: AcceptanceRules = EXACT,
    noise_candidates: int = 256,
    keyed_by_round: bool = True,
    verify: Callable[..., list[Outcome]] = verify,
) -> Run:
    """`length` tokens for every request, drafting anew each round.

    How much is verified: all, or what `lengths` says, or what `plan` makes of the present drafts (n, block).
    """
    judge = partial(verify, rules=rules, noise_candidates=noise_candidates)
    run = Run(np.full((len(samplings), length + block + 1), -1))
    drafts = np.full((len(samplings), block), -1)
    done = np.zeros(len(samplings), dtype=int)
    while (active := np.flatnonzero(done < length)).size:
        some = [samplings[i] for i in active.tolist()]
        anchors = np.where(done[active] > 0, run.tokens[active, done[active] - 1], 0)
        wanted = np.full(len(active), block) if lengths is None else lengths(run.rounds, drafts[active])
        starts = done[active] + 1
        drafted = _propose(world, some, anchors, starts, block, chooser or DraftChooser(), keyed_by_round)
        drafts[active] = drafted.tokens
        wanted = wanted if plan is None else plan(drafted.tokens)
        outcomes = _verify(world, some, anchors, starts, drafted, wanted, judge)
        for i, row, outcome in zip(active, drafted.tokens, outcomes, strict=True):
            assert outcome.error is None
            run.tokens[i, done[i] : done[i] + outcome.accepted + 1] = [*row[: outcome.accepted], outcome.token]
            done[i] += outcome.accepted + 1
        run.rounds += 1
        run.verified += int(wanted.sum())
        run.accepted += sum(o.accepted for o in outcomes)
        run.rejected += sum(o.accepted < n for o, n in zip(outcomes, wanted.tolist(), strict=True))
    run.tokens = run.tokens[:, :length]
    return run


@dataclass(frozen=True)
class Drafted:
    """Blocks (n, block), and by draft position what each token was drawn from."""

    tokens: np.ndarray
    distributions: list[list[SparseDistribution | None]]

    def shipped(self, i: int, count: int) -> tuple[SparseDistribution, ...]:
        return tuple(q for at in self.distributions[:count] if (q := at[i]) is not None)


def _propose(
    world: World,
    samplings: Sequence[Sampling],
    anchors: np.ndarray,
    starts: np.ndarray,
    block: int,
    chooser: DraftChooser,
    keyed_by_round: bool,
) -> Drafted:
    previous, committed = torch.from_numpy(anchors), torch.from_numpy(starts)
    choices = []
    for k in range(block):
        key = committed if keyed_by_round else None
        choices.append(chooser.choose(world.drafter[previous], samplings, committed + k, world.d2t, committed=key))
        previous = choices[-1].tokens
    return Drafted(torch.stack([c.tokens for c in choices], 1).numpy(), [c.distributions for c in choices])


def _verify(
    world: World,
    samplings: Sequence[Sampling],
    anchors: np.ndarray,
    starts: np.ndarray,
    drafted: Drafted,
    wanted: np.ndarray,
    judge: Callable[..., list[Outcome]],
) -> list[Outcome]:
    context = np.concatenate((anchors[:, None], drafted.tokens), 1)
    width = context.shape[1]
    requests = [
        Candidate(sampling, i * width, start, tuple(row[:count]), drafted.shipped(i, count))
        for i, (sampling, start, row, count) in enumerate(
            zip(samplings, starts.tolist(), drafted.tokens.tolist(), wanted.tolist(), strict=True)
        )
    ]
    logits = world.target[torch.from_numpy(context)].flatten(0, 1)
    return judge(logits, requests)


def processed(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The processed distribution of each row (float64), written as its definition reads."""
    return np.stack([_processed_row(row, sampling) for row in np.asarray(logits, dtype=np.float64)])


def _processed_row(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    order = np.lexsort((np.arange(len(row)), -row))
    p = np.exp((row[order] - row.max()) / sampling.temperature)
    if sampling.top_k:
        p[sampling.top_k :] = 0.0
    p /= p.sum()
    if sampling.top_p < 1.0:
        p[np.cumsum(p) - p >= sampling.top_p] = 0.0
    p[p < sampling.min_p * p[0]] = 0.0
    out = np.zeros(len(row))
    out[order] = p / p.sum()
    return out


def sequence_distribution(world: World, sampling: Sampling, length: int) -> np.ndarray:
    """Exact probabilities of every sequence of `length` tokens after token 0: shape (V,) * length."""
    table = processed(world.target.numpy(), sampling)
    joint: np.ndarray = table[0]
    for _ in range(length - 1):
        joint = joint[..., None] * table
    return joint


def fit(run: Run, expected: np.ndarray) -> float:
    """p-value of the first tokens of a run against exact probabilities; rare sequences are counted together."""
    length = expected.ndim
    cells = np.ravel_multi_index(tuple(run.tokens[:, i] for i in range(length)), expected.shape)
    counts = np.bincount(cells, minlength=expected.size)
    means = expected.ravel() * len(run.tokens)
    if counts[means == 0].any():
        return 0.0
    rare = means < 10
    observed, mean = counts[~rare], means[~rare]
    if means[rare].sum() >= 10:
        observed, mean = np.append(observed, counts[rare].sum()), np.append(mean, means[rare].sum())
    return float(scipy.stats.chisquare(observed, mean * observed.sum() / mean.sum()).pvalue)
