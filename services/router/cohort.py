"""The sequences open on one verify worker, which its rounds serve together."""

from __future__ import annotations

import asyncio

from services.router.links import VerifierLink
from services.router.sequences import Sequence

__all__ = ["Cohort"]


class Cohort:
    """Sequences join and leave between rounds; one whose client is far behind in reading sits rounds out."""

    def __init__(self, link: VerifierLink) -> None:
        self.link = link
        self._changed = asyncio.Event()

    def join(self, sequence: Sequence) -> None:
        """From the next round on."""
        self.link.sequences[sequence.sequence_id] = sequence
        sequence.cohort = self
        sequence.outlet.on_room = self._changed.set
        self._changed.set()

    def leave(self, sequence: Sequence) -> None:
        """Not in the next batch; a verdict still on its way is ignored."""
        self.link.sequences.pop(sequence.sequence_id, None)
        sequence.cohort = None
        sequence.outlet.on_room = None

    @property
    def sequences(self) -> list[Sequence]:
        """All of them."""
        return list(self.link.sequences.values())

    def running(self) -> list[Sequence]:
        """Those whose next step is a round."""
        return [s for s in self.link.sequences.values() if s.running and not s.outlet.full]

    def prompts(self) -> list[Sequence]:
        """Those whose committed tokens are still being computed."""
        return [s for s in self.link.sequences.values() if not s.running]

    async def wait_ready(self) -> None:
        """Returns when there is something to step."""
        while not self.running() and not self.prompts():
            self._changed.clear()
            await self._changed.wait()
