"""Which worker gets a sequence: pure choices from load readings and our own counts."""

from __future__ import annotations

from collections.abc import Iterable

from dspark.messages import ModelInfo
from services.router.links import DraftLink, Link, VerifierLink
from services.router.sequences import Sequence

__all__ = ["choose_drafter", "choose_verifier", "evacuees", "even_out", "has_room", "may_serve"]


def may_serve(link: VerifierLink, sequence: Sequence) -> bool:
    """Whether new work may go there, could ever fit, and would get the same bits as where the sequence began."""
    if not link.alive or link.load.draining or link.capacity < sequence.request.max_len:
        return False
    if sequence.numerics is not None:
        return link.model.numerics_fingerprint == sequence.numerics
    return link.model.model_fingerprint == sequence.model.info.model_fingerprint


def has_room(link: VerifierLink, sequence: Sequence, *, max_running: int, now: float) -> bool:
    """Whether the worker should be able to open the sequence: the reading may be old, so it may still refuse.

    A step must hold every running sequence's anchor twice over, so that prompts and drafts have rows as well.
    """
    if now < link.hold_until or link.own >= _slots(link, max_running):
        return False
    return link.own == 0 or link.free_pages >= link.pages(sequence.request.max_len)


def evacuees(link: VerifierLink, others: Iterable[VerifierLink], *, max_running: int) -> list[Sequence]:
    """Sequences of a worker about to leave that fit elsewhere together; the rest go on where they are."""
    slots = {other: _slots(other, max_running) - other.own for other in others if other is not link}
    pages = {other: other.free_pages for other in slots}
    leaving = []
    for sequence in link.sequences.values():
        need = {other: other.pages(sequence.request.max_len) for other in slots if may_serve(other, sequence)}
        to = next((other for other in need if slots[other] > 0 and pages[other] >= need[other]), None)
        if to is not None:
            slots[to] -= 1
            pages[to] -= need[to]
            leaving.append(sequence)
    return leaving


def choose_verifier(links: Iterable[VerifierLink]) -> VerifierLink | None:
    """The least occupied of workers with room; one that the store does not list only if no other is there."""
    return min(links, key=_cost, default=None)


def choose_drafter(links: Iterable[DraftLink], model: ModelInfo) -> DraftLink | None:
    """The least occupied draft worker for the model that is not about to leave."""
    return min((link for link in links if _may_draft(link, model)), key=_cost, default=None)


def even_out(links: Iterable[DraftLink]) -> list[tuple[Sequence, DraftLink]]:
    """Moves after which no draft worker has two sequences of ours more than another that could take them."""
    own = {link: link.own for link in links}
    free = {link: [s for s in link.sequences.values() if not s.attaching] for link in own}
    moves: list[tuple[Sequence, DraftLink]] = []
    while True:
        pairs = [
            (own[to] - own[source], source, to)
            for source in own
            for to in own
            if own[source] - own[to] >= 2 and free[source] and _may_draft(to, free[source][-1].model.info)
        ]
        if not pairs:
            return moves
        _, source, to = min(pairs, key=lambda pair: pair[0])
        moves.append((free[source].pop(), to))
        own[source] -= 1
        own[to] += 1


def _slots(link: VerifierLink, max_running: int) -> int:
    return min(max_running, max(1, link.max_step_tokens // 2))


def _may_draft(link: DraftLink, model: ModelInfo) -> bool:
    return link.alive and not link.load.draining and link.fits(model)


def _cost(link: Link) -> tuple[bool, int, int, str]:
    return (not link.listed, link.occupancy, link.load.tokens_in_flight, link.worker_id)
