"""Sends what is larger than a message may be: named byte strings, cut into pieces of at most 1 MiB."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterator

from dspark.errors import InvalidRequest
from dspark.v1 import types_pb2

__all__ = ["PIECE_SIZE", "join", "split"]

PIECE_SIZE = 1024 * 1024


def split(name: str, data: bytes | memoryview, piece_size: int = PIECE_SIZE) -> Iterator[types_pb2.Piece]:
    """The pieces of `data` in order; one empty piece where there is no data."""
    view = memoryview(data).cast("B")
    size = view.nbytes
    for offset in range(0, max(size, 1), piece_size):
        yield types_pb2.Piece(name=name, offset=offset, size=size, data=bytes(view[offset : offset + piece_size]))


async def join(pieces: AsyncIterable[types_pb2.Piece], *, max_bytes: int = 1 << 30) -> dict[str, bytes]:
    """Every named byte string, whole. `InvalidRequest` where a piece is missing, repeated, or all exceed max_bytes."""
    parts: dict[str, bytearray] = {}
    sizes: dict[str, int] = {}
    async for piece in pieces:
        _append(piece, parts.setdefault(piece.name, bytearray()), sizes.setdefault(piece.name, piece.size))
        if sum(sizes.values()) > max_bytes:
            raise InvalidRequest(f"pieces: {sum(sizes.values())} bytes announced, the limit is {max_bytes}")
    for name, part in parts.items():
        if len(part) != sizes[name]:
            raise InvalidRequest(f"pieces of {name!r} end at byte {len(part)} of {sizes[name]}")
    return {name: bytes(part) for name, part in parts.items()}


def _append(piece: types_pb2.Piece, part: bytearray, size: int) -> None:
    if piece.size != size or piece.offset != len(part) or piece.offset + len(piece.data) > size:
        raise InvalidRequest(
            f"piece of {piece.name!r} at byte {piece.offset} ({len(piece.data)} bytes of {piece.size}) does not "
            f"continue the {len(part)} bytes of {size} that came before"
        )
    part += piece.data
