"""Rounds of decoding without a cluster: what a drafter would gain along texts that the target has already written.

`play` drafts with the served engine, many texts at once, and compares each block with its text. In greedy and coupled
settings the output does not depend on the drafts, so this is exactly what a cluster does; in the rejection setting
accepted lengths, drafts up to the first that falls, and the confidences of one more are distributed as in decoding
(`training.reverse`).

Positions are those of `dspark.messages`: a round at committed length N has its anchor at position N - 1 and its k-th
draft token is for position N - 1 + k. The first round of a text is at N = P + 1, the first token behind its prompt of P
tokens being the prompt step's. The last rounds draft less: a request that may still emit m tokens drafts m - 1, and
nothing is drafted behind the end-of-sequence token (`Text.room`). A round accepts what its text goes on with; where it
accepts the end-of-sequence token itself, no token follows.

    texts = observe(target, answer(target, prompts, 96), [drafter], laws=True)
    rounds = play(drafter, texts, "rejection")
    rounds.tau, rounds.conditional_acceptance()

Leaves figures made of rounds to `training.report` and calibration to `training.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.kernels import Kernels
from dspark.models.drafters import Drafter
from dspark.models.drafters.calibration import SETTINGS
from training.proposers import AnyDrafter, Proposer
from training.texts import Observed, Text

__all__ = ["Rounds", "follow", "play"]


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """r rounds with blocks of n tokens, by text and then by committed length.

    `logits` (r, n) float32: raw confidence logits, before any calibration; NaN for a drafter without confidences, and
    for places behind what was proposed. Those behind `drafted` were proposed but could not have been verified.
    `accepted` (r,) int64, at most `drafted` (r,) int64. `text` (r,) int64: which text; `committed` (r,) int64: N.
    """

    logits: Tensor
    accepted: Tensor
    drafted: Tensor
    text: Tensor
    committed: Tensor

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def block_size(self) -> int:
        """Places of a block, n."""
        return self.logits.shape[1]

    @property
    def tau(self) -> float:
        """Accepted length: tokens gained a round, the bonus token included (DSpark §2.1); 0 without rounds."""
        return 1.0 + float(self.accepted.double().mean()) if len(self) else 0.0

    def conditional_acceptance(self) -> list[float]:
        """For k = 1 … n: the share accepted of k-th draft tokens whose predecessors all were; NaN for none."""
        shares = []
        for k in range(1, self.block_size + 1):
            tried = (self.drafted >= k) & (self.accepted >= k - 1)
            shares.append(float((self.accepted[tried] >= k).double().mean()))
        return shares

    def select(self, rows: Tensor) -> Rounds:
        """Some of the rounds, by index or mask."""
        return Rounds(self.logits[rows], self.accepted[rows], self.drafted[rows], self.text[rows], self.committed[rows])

    @staticmethod
    def joined(parts: Sequence[Rounds]) -> Rounds:
        """Rounds of several plays with one block size; texts are numbered as in their own play."""
        columns = ("logits", "accepted", "drafted", "text", "committed")
        return Rounds(*(torch.cat([getattr(part, column) for part in parts]) for column in columns))


def play(
    drafter: AnyDrafter,
    texts: Sequence[Observed],
    setting: str,
    *,
    verify_length: int | None = None,
    batch: int = 64,
    draft_top_k: int = 64,
    every: bool = False,
    kernels: Kernels | None = None,
    played: Callable[[int], None] = lambda _: None,
) -> Rounds:
    """The rounds that a drafter gets along texts.

    Args:
        drafter: as `load_drafter` gives it, or prompt lookup.
        texts: as `training.texts.observe` gives them for this drafter; drawn at temperature 0 for "greedy" and above it
            for the others, with `laws=True` for "rejection".
        setting: "greedy", "coupled" or "rejection".
        verify_length: most draft tokens verified a round; the block size where None.
        batch: texts drafted for at once.
        draft_top_k: as the draft worker's setting of that name.
        every: play a round at every committed length instead of going on behind what was accepted: what any way of
            trimming blocks would meet. A proposal is a function of text, committed length and `verify_length` alone.
        kernels: what the drafter runs on; by default as a draft worker of the drafter's device chooses them.
        played: hears how many texts each step has ended.

    Raises:
        ConfigError: an unknown setting, or texts that do not suit it or the drafter.
    """
    _check(drafter, texts, setting)
    proposer = Proposer(
        drafter, setting, texts, batch=batch, draft_top_k=draft_top_k, verify_length=verify_length, kernels=kernels
    )
    cap = proposer.block_size if verify_length is None else min(verify_length, proposer.block_size)
    table = _Table()
    waiting = iter(enumerate(texts))
    running: list[_Running] = []
    while True:
        _fill(running, waiting, proposer, batch)
        if not running:
            return table.rounds(proposer.block_size)
        tokens, logits = proposer.propose([(one.number, one.committed) for one in running])
        for one, block, row in zip(running, tokens.tolist(), logits, strict=True):
            accepted, drafted = _compare(one.text, one.committed, block, cap)
            table.add(row, accepted, drafted, one.number, one.committed)
            one.committed += 1 if every else accepted + 1
        ended = [one for one in running if one.committed >= len(one.text)]
        for one in ended:
            proposer.end(one.number)
            running.remove(one)
        played(len(ended))


def follow(every: Rounds, lengths: Tensor) -> Rounds:
    """The rounds that decoding meets when it verifies `lengths` (r,) tokens at most, out of those at every length.

    `every` is what `play(…, every=True)` gave. Each round's `drafted` and `accepted` are cut to its length, and the
    text goes on behind what is then accepted: what trimming blocks comes to, short rounds being played anew.
    """
    cut, gone_on = torch.minimum(every.accepted, lengths), []
    gains, texts = (cut + 1).tolist(), every.text.tolist()
    row = 0
    while row < len(every):
        gone_on.append(row)
        following = row + gains[row]
        while row < min(following, len(every)) and texts[row] == texts[gone_on[-1]]:
            row += 1
    shorter = replace(every, accepted=cut, drafted=torch.minimum(every.drafted, lengths))
    return shorter.select(torch.tensor(gone_on, dtype=torch.int64))


@dataclass(slots=True, eq=False)
class _Running:
    number: int
    text: Text
    committed: int


@dataclass(slots=True)
class _Table:
    logits: list[Tensor] = field(default_factory=list)
    counts: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, logits: Tensor, accepted: int, drafted: int, number: int, committed: int) -> None:
        self.logits.append(logits)
        self.counts.append((number, committed, accepted, drafted))

    def rounds(self, block_size: int) -> Rounds:
        order = sorted(range(len(self.counts)), key=lambda row: self.counts[row])
        counts = torch.tensor([self.counts[row] for row in order], dtype=torch.int64).view(-1, 4)
        logits = torch.stack([self.logits[row] for row in order]) if order else torch.empty(0, block_size)
        text, committed, accepted, drafted = counts.unbind(1)
        return Rounds(logits, accepted, drafted, text, committed)


def _check(drafter: AnyDrafter, texts: Sequence[Observed], setting: str) -> None:
    if setting not in SETTINGS:
        raise ConfigError(f"setting {setting!r} is none of {', '.join(SETTINGS)}")
    if any((one.text.temperature == 0) != (setting == "greedy") for one in texts):
        wanted = "at temperature 0" if setting == "greedy" else "at a temperature above 0"
        raise ConfigError(f"the {setting} setting is played on texts drawn {wanted}")
    if setting == "rejection" and any(one.log_z is None for one in texts):
        raise ConfigError("the rejection setting needs texts observed with their laws")
    if isinstance(drafter, Drafter) and any(drafter.tap.tap_id not in one.features for one in texts):
        raise ConfigError(f"the texts were not observed for the drafter {drafter.config.name!r}")


def _fill(running: list[_Running], waiting: Iterator[tuple[int, Observed]], proposer: Proposer, batch: int) -> None:
    while len(running) < batch and (following := next(waiting, None)) is not None:
        number, observed = following
        first = observed.text.prompt_length + 1
        if first < len(observed.text):  # otherwise the prompt's step was all
            proposer.begin(number, observed)
            running.append(_Running(number, observed.text, first))


def _compare(text: Text, committed: int, block: Sequence[int], cap: int) -> tuple[int, int]:
    """How many tokens of a block stand, and how many were drafted."""
    proposed = sum(token >= 0 for token in block)
    drafted = min(proposed, cap, text.room(committed))
    known = text.token_ids[committed : committed + drafted]
    accepted = next((k for k, (ours, theirs) in enumerate(zip(block, known, strict=False)) if ours != theirs), drafted)
    return accepted, drafted
