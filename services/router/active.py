"""The requests that have not ended, by id. Knows nothing of where they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from dspark.errors import InvalidRequest
from services.router.sequences import Sequence

__all__ = ["Active"]


class Active:
    """A registry; iterating goes over a copy, so that requests may end meanwhile."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        return iter(tuple(self._sequences.values()))

    def add(self, sequence: Sequence) -> None:
        """`InvalidRequest` for the id of a request that is here."""
        request_id = sequence.request.request_id
        if request_id in self._sequences:
            raise InvalidRequest(f"request_id {request_id!r} is that of a request still running")
        self._sequences[request_id] = sequence
        self._none.clear()

    def get(self, request_id: str) -> Sequence | None:
        """The request of that id."""
        return self._sequences.get(request_id)

    def forget(self, sequence: Sequence) -> bool:
        """It has ended; whether it was here."""
        request_id = sequence.request.request_id
        if self._sequences.get(request_id) is not sequence:
            return False
        del self._sequences[request_id]
        if not self._sequences:
            self._none.set()
        return True

    async def until_none(self) -> None:
        """Returns when no request is left."""
        await self._none.wait()
