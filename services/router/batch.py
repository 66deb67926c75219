"""What a round asks of its verify worker: an entry a sequence, its item and what to remember until the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dspark.messages import Alternative, Proposal, SequenceKey, StepItem
from services.router.cohort import Cohort
from services.router.round import Round
from services.router.sequences import Sequence

__all__ = ["Entry", "assemble", "judged_rows", "rows"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence's part in a batch."""

    sequence: Sequence
    item: StepItem
    row: int | None = None  # in the round; None: a piece of its prompt
    drafted: int = 0
    missed: bool = False


def assemble(cohort: Cohort, round_: Round, proposals: Mapping[str, Proposal]) -> list[Entry]:
    """The batch: every running sequence's anchor and draft prefix, and pieces of prompts in the rows that are left.

    Who was cancelled, has moved or rests since the round began is left out.
    """
    plans = zip(round_.running, round_.keys, round_.proposed, *round_.lengths, strict=True)
    rounds = [
        _round(round_, row, proposals.get(sequence.sequence_id) if proposed else None, length, keep, missed)
        for row, (sequence, key, proposed, length, keep, missed) in enumerate(plans)
        if _stays(sequence, key, cohort) and not sequence.outlet.full
    ]
    pieces = zip(round_.prompts, round_.prompt_keys, round_.pieces, strict=True)
    return rounds + [
        _piece(prompt, count, held=round_.prompts_held)
        for prompt, key, count in pieces
        if count and _stays(prompt, key, cohort)
    ]


def _stays(sequence: Sequence, key: SequenceKey, cohort: Cohort) -> bool:
    return sequence.cohort is cohort and sequence.key == key


def _round(round_: Round, row: int, block: Proposal | None, length: int, keep: int, missed: int) -> Entry:
    sequence, others = round_.running[row], block.alternatives if block else ()
    item = StepItem(
        sequence.key,
        sequence.committed_len,
        sequence.uncomputed,
        block.tokens[:length] if block else (),
        block.distributions[:length] if block else (),
        keep if keep < length else None,
        hold_features=bool(round_.held[row]),
        alternatives=tuple(Alternative(place, others[place - 1]) for place in round_.places(row) if others),
    )
    return Entry(sequence, item, row, drafted=len(block.tokens) if block else 0, missed=bool(missed))


def _piece(sequence: Sequence, count: int, *, held: bool) -> Entry:
    return Entry(sequence, StepItem(sequence.key, sequence.committed_len, count, hold_features=held))


def rows(batch: Iterable[Entry]) -> int:
    """Of the step."""
    return sum(entry.item.rows for entry in batch)


def judged_rows(batch: Iterable[Entry]) -> int:
    """Those of them that verdicts come from: not the insides of prompts."""
    return sum(1 + entry.item.rows - entry.item.count for entry in batch if entry.row is not None)
