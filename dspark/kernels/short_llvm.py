"""Weights of bfloat16 in 12 or 13 bits, and the same numbers still.

The lower byte of a weight, the last digit of its exponent and seven of its own, is as good as random. The upper one,
its sign and the rest of its exponent, is one of some twenty in a trained matrix, so a code of four or five bits stands
for it. Steps of few rows take as long as reading the weights does, and a few instructions a step have in registers
what `forms_llvm.Dots` reads. Lossless floats of variable length (DFloat11) save a little more, and cannot be read so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llvmlite import ir

from dspark.kernels.forms_llvm import Dots
from dspark.kernels.parts_llvm import INT32, Writer, number

__all__ = ["MOST_UPPER", "Short", "shortened"]

MOST_UPPER = 32
_FOUR = 16  # that four bits tell apart
_PART = 1 << 22  # weights looked at together: what that takes beside them is several times as much
_BYTE, _WORD = ir.IntType(8), ir.IntType(16)


class Short(Dots):
    """As `Dots`, weights of a few different upper bytes in 12 bits, or 13 where there are more than 16.

    A step has 64 lower bytes, in the order in which instructions interleave them with upper ones, then 32 bytes of
    their codes, those of the last 32 above those of the first, then, where codes have five bits, the highest of each.
    Behind a panel's steps lies what codes stand for: 16 upper bytes four times over, and so 16 more.
    """

    def __init__(self, lanes: int, *, five: bool) -> None:
        """`five`: bits of a code, else four."""
        super().__init__(lanes)
        self.name = "short5" if five else "short4"
        self.vectors, self.behind = (13, 16) if five else (12, 8)
        self._five, self._both = five, self.stored
        self.stored = ir.VectorType(INT32, 2)  # everything lies at a multiple of its bytes
        self._bytes, self._words = ir.VectorType(_BYTE, 4 * lanes), ir.VectorType(_WORD, 2 * lanes)

    def tables(self, write: Writer, behind: ir.Value) -> Sequence[ir.Value]:
        """Upper bytes by codes."""
        places = (0, 8) if self._five else (0,)
        return [write.load(write.at(behind, number(place)), self._bytes) for place in places]

    def load(self, write: Writer, at: ir.Value, tables: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Both halves of the panel's outputs, as `Dots` has them."""
        count = self._bytes.count
        lower, upper = write.load(at, self._bytes), self._upper(write, at, tables)
        lanes = [[16 * lane + place for place in range(16)] for lane in range(count // 16)]
        low, high = ([place for lane in lanes for place in lane[part]] for part in (slice(8), slice(8, 16)))
        return self._joined(write, lower, upper, low), self._joined(write, lower, upper, high)

    def _upper(self, write: Writer, at: ir.Value, tables: Sequence[ir.Value]) -> ir.Value:
        """Upper bytes of all the lower ones."""
        build, count = write.build, self._bytes.count
        pairs = write.load(write.at(at, number(8)), ir.VectorType(_BYTE, count // 2))
        twice = ir.Constant(ir.VectorType(INT32, count), [*range(count // 2)] * 2)
        pairs = build.bitcast(build.shuffle_vector(pairs, pairs, twice), self._words)
        quarter = count // 4
        codes = build.bitcast(build.lshr(pairs, ir.Constant(self._words, [0] * quarter + [4] * quarter)), self._bytes)
        codes = build.and_(codes, ir.Constant(self._bytes, [15] * count))
        few, *more = (write.call("x86.avx512.pshuf.b.512", self._bytes, table, codes) for table in tables)
        if not more:
            return few
        places = build.bitcast(write.at(at, number(12)), ir.IntType(count).as_pointer())
        mask = build.bitcast(build.load(places, align=4), ir.VectorType(ir.IntType(1), count))
        return build.select(mask, more[0], few)

    def _joined(self, write: Writer, lower: ir.Value, upper: ir.Value, places: Sequence[int]) -> ir.Value:
        """Bytes at some places of both, beside each other."""
        count = self._bytes.count
        both = [place for one in places for place in (one, count + one)]
        picked = ir.Constant(ir.VectorType(INT32, count), both)
        return write.build.bitcast(write.build.shuffle_vector(lower, upper, picked), self._both)


def shortened(panels: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    """Weights as `Dots` reads them, (panels, steps, 2, lanes, 2) of 16 bits, ↦ (panels, bytes) as `Short` does.

    With it, whether codes have five bits. None where there are too many different upper bytes.
    """
    count = max(1, _PART // panels[0].numel())
    parts = [panels[first : first + count] for first in range(0, len(panels), count)]
    occurring = torch.stack([_counts(part) for part in parts]).sum(0).nonzero().flatten()
    if len(occurring) > MOST_UPPER:
        return None
    five, code = len(occurring) > _FOUR, torch.zeros(256, dtype=torch.uint8)
    code[occurring] = torch.arange(len(occurring), dtype=torch.uint8)
    table = torch.zeros(2, _FOUR, dtype=torch.uint8)
    table.view(-1)[: len(occurring)] = occurring
    tables = table.repeat(1, 4)[: 1 + five].flatten()
    own = [torch.cat((_steps(part, code, five=five), tables.expand(len(part), -1)), 1) for part in parts]
    return torch.cat(own), five


def _counts(panels: torch.Tensor) -> torch.Tensor:
    """How often each upper byte occurs."""
    return torch.bincount(_bytes(panels)[1].flatten(), minlength=256)


def _bytes(panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bytes of a step's 64 weights (panels, steps, 64): eight of each half of outputs in turn."""
    count, steps = panels.shape[:2]
    ordered = panels.view(torch.uint8).view(count, steps, 2, 4, 8, 2).transpose(2, 3)
    lower, upper = (ordered[..., place].reshape(count, steps, 64) for place in (0, 1))
    return lower, upper


def _steps(panels: torch.Tensor, code: torch.Tensor, *, five: bool) -> torch.Tensor:
    """Their bytes (panels, any)."""
    lower, upper = _bytes(panels)
    codes = code.index_select(0, upper.flatten().int()).view_as(upper)
    parts = [lower, (codes[..., :32] & 15) | (codes[..., 32:] << 4)]
    if five:
        parts.append(_bits(codes >> 4))
    return torch.cat(parts, 2).flatten(1)


def _bits(ones: torch.Tensor) -> torch.Tensor:
    """Zeros and ones (panels, steps, 64), the first the lowest, ↦ bytes (panels, steps, 8)."""
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
    return (ones.view(*ones.shape[:2], 8, 8) * places).sum(3, dtype=torch.uint8)
