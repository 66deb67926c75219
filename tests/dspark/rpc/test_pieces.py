from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import InvalidRequest
from dspark.rpc.pieces import join, split
from dspark.v1.types_pb2 import Piece


async def stream(*pieces: Piece) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


@given(st.dictionaries(st.sampled_from("abc"), st.binary(max_size=20)), st.integers(1, 7))
async def test_split_and_join_are_inverse(contents: dict[str, bytes], size: int) -> None:
    pieces = [piece for name, data in contents.items() for piece in split(name, data, size)]
    assert all(len(piece.data) <= size for piece in pieces)
    assert await join(stream(*pieces)) == contents


@pytest.mark.parametrize("drop", [0, 1, 2])
async def test_a_missing_piece_is_refused(drop: int) -> None:
    pieces = list(split("t", b"abcdef", 2))
    del pieces[drop]
    with pytest.raises(InvalidRequest, match="'t'"):
        await join(stream(*pieces))


async def test_more_than_the_limit_is_refused_before_it_is_kept() -> None:
    with pytest.raises(InvalidRequest, match="the limit is 10"):
        await join(stream(Piece(name="t", size=11, data=b"a")), max_bytes=10)
