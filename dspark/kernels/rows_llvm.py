"""Norms, rotary embedding and activations of single rows, as code for the processor at hand.

A row's sums run through its numbers in order, lane beside lane, so its bits depend on nothing else in the batch. Every
function takes shares of the rows 0 … rows - 1 until none is left: `share` at a time, `next` is 0 at the start.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.parts_llvm import FLOAT, HALF, INT, INT32, Code, Writer, compile_module, host_lanes, kernel, number

__all__ = ["ActivationArguments", "CodeArguments", "CopyArguments", "NormArguments", "RotaryArguments", "compiled"]

_GELU_INNER, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715
_LEAST = 1e-30  # of what a row of zeros is divided by
_SHARED = [(name, ctypes.c_int64) for name in ("rows", "share", "next")]


class NormArguments(ctypes.Structure):
    """Of `rms_norm`, `add_norm` and `add_normed_norm`.

    All of (rows, size) float32: `x`, the second summand `y`, their `total`, and `out`; `weight` and `y_weight` (size,).
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("x", "y", "total", "out", "weight", "y_weight", "size")),
        ("eps", ctypes.c_double),
        *_SHARED,
    ]


class RotaryArguments(ctypes.Structure):
    """Of `norm_rotary_write` and `norm_rotary_round`.

    `qkv` (rows, heads + 2 · kv_heads, size), `weight` (heads + kv_heads, size), `cos` and `sin` (rows, size / 2), `q`
    (rows, heads, size), all float32; a head of `storage` is `head_stride` float32s, or bfloat16s, rows go to its
    `slots`, 64-bit integers.
    """

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("qkv", "weight", "cos", "sin", "q", "storage", "slots", "heads", "kv_heads", "size")
        ),
        ("head_stride", ctypes.c_int64),
        ("eps", ctypes.c_double),
        *_SHARED,
    ]


class TurnedArguments(ctypes.Structure):
    """Of `norm_rotary`.

    `x` (rows, heads, size) with `stride` float32s a row, `out` the same without gaps, `weight` (heads, size), `cos` and
    `sin` (rows, size / 2), all float32.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("x", "weight", "cos", "sin", "out", "heads", "size", "stride")),
        ("eps", ctypes.c_double),
        *_SHARED,
    ]


class CopyArguments(ctypes.Structure):
    """Of `copy_rows`: rows of `size` float32s within each of `heads` heads, `head_stride` float32s apart.

    From slots `source` to slots `to`, 64-bit integers, of which `*count` count.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("storage", "source", "to", "count", "heads", "size", "head_stride", "share", "next")
    ]


class CodeArguments(ctypes.Structure):
    """Of `codes`: `x` (rows, size) float32, `out` as many bytes, `scales` (rows,) float32.

    Of `bounded_codes`, `scales` is (rows, 3): scale, length, error.
    """

    _fields_ = [*((name, ctypes.c_int64) for name in ("x", "out", "scales", "size")), *_SHARED]


class ActivationArguments(ctypes.Structure):
    """Of `gelu_tanh` and `silu`.

    `out` (rows, size) float32; `x` has `stride` float32s a row: gates, `size` of them, then as many ups.
    """

    _fields_ = [*((name, ctypes.c_int64) for name in ("x", "out", "size", "stride")), *_SHARED]


@lru_cache(maxsize=8)
def compiled(lanes: int | None = None) -> Code:
    """All of these functions, for vectors of `lanes` float32s: rows are whole vectors."""
    module = ir.Module("rows")
    lanes = lanes or host_lanes()
    writers: Mapping[str, Callable[[Writer], None]] = {
        "rms_norm": lambda write: _write_norm(write, summed=False, normed=False),
        "add_norm": lambda write: _write_norm(write, summed=True, normed=False),
        "add_normed_norm": lambda write: _write_norm(write, summed=True, normed=True),
        "norm_rotary": _write_turned,
        "norm_rotary_write": lambda write: _write_rotary(write, rounded=False),
        "norm_rotary_round": lambda write: _write_rotary(write, rounded=True),
        "copy_rows": _write_copies,
        "codes": lambda write: _write_codes(write, bounded=False),
        "bounded_codes": lambda write: _write_codes(write, bounded=True),
        "gelu_tanh": lambda write: _write_activation(write, _gelu_tanh),
        "silu": lambda write: _write_activation(write, _silu),
    }
    for name, body in writers.items():
        write = kernel(module, name, lanes)
        body(write)
        write.build.ret_void()
    return compile_module(module, list(writers))


def _given(write: Writer, arguments: type[ctypes.Structure]) -> dict[str, ir.Value]:
    """Values of the arguments: addresses as pointers to float32, `eps` as a float32, counts; and where `next` is."""
    build, given = write.build, {}
    counts = {"rows", "share", "size", "stride", "heads", "kv_heads", "head_stride"}
    for name, at in write.fields(arguments).items():
        if name == "next":
            given[name] = at
            continue
        value = build.load(at)
        if name == "eps":
            value = write.rounded(value)
        elif name not in counts:
            value = write.floats(value)
        given[name] = value
    return given


@contextmanager
def _rows(write: Writer, given: Mapping[str, ir.Value]) -> Iterator[ir.Value]:
    with write.taking(given["next"], given["share"], given["rows"]) as (first, end), write.counting(first, end) as row:
        yield row


def _scale(write: Writer, row: ir.Value, size: ir.Value, eps: ir.Value) -> ir.Value:
    """1 / sqrt(mean(row²) + eps), in all lanes."""
    build = write.build

    def add(at: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
        value = write.load(write.at(row, at))
        return [write.fma(value, value, total[0])]

    squares = write.summing(number(0), size, [write.zero], add, step=write.lanes)
    mean = build.fdiv(write.folded(squares[0], build.fadd), build.sitofp(size, FLOAT))
    return build.fdiv(write.constant(1.0), write.sqrt(write.broadcast(build.fadd(mean, eps))))


def _write_norm(write: Writer, *, summed: bool, normed: bool) -> None:
    """The norm of x, or of x + y, or of x + norm(y)."""
    given, build = _given(write, NormArguments), write.build
    size = given["size"]
    with _rows(write, given) as row:
        at = build.mul(row, size)
        x, y, total, out = (write.at(given[name], at) for name in ("x", "y", "total", "out"))
        if summed:
            y_scale = _scale(write, y, size, given["eps"]) if normed else None
            with write.counting(number(0), size, write.lanes) as place:
                value = write.load(write.at(y, place))
                if y_scale is not None:
                    weight = write.load(write.at(given["y_weight"], place))
                    value = build.fmul(build.fmul(value, y_scale), weight)
                write.store(build.fadd(write.load(write.at(x, place)), value), write.at(total, place))
            x = total
        scale = _scale(write, x, size, given["eps"])
        with write.counting(number(0), size, write.lanes) as place:
            value, weight = write.load(write.at(x, place)), write.load(write.at(given["weight"], place))
            write.store(build.fmul(build.fmul(value, scale), weight), write.at(out, place))


def _write_codes(write: Writer, *, bounded: bool) -> None:
    """Rows as whole numbers 1 to 255 around 128, and what one of them is: NaN where the row holds one.

    `bounded`: the row's length, and that of what the whole numbers leave of it, too.
    """
    given, build, lanes = _given(write, CodeArguments), write.build, write.lanes
    size, bytes_ = given["size"], ir.VectorType(ir.IntType(8), lanes)
    with _rows(write, given) as row:
        x = write.at(given["x"], build.mul(row, size))
        out = write.at(build.bitcast(given["out"], ir.IntType(8).as_pointer()), build.mul(row, size))
        figures = write.at(given["scales"], write.times(row, 3 if bounded else 1))

        def widest(at: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
            value = write.load(write.at(x, at))
            return [write.maximum(write.maximum(value, build.fsub(write.zero, value)), most[0])]

        (most,) = write.summing(number(0), size, [write.constant(_LEAST)], widest, step=lanes)
        most = write.broadcast(write.folded(most, write.maximum))
        scale = build.fdiv(most, write.constant(127.0))
        build.store(build.extract_element(scale, ir.Constant(INT32, 0)), figures)
        steps = build.fdiv(write.constant(127.0), most)

        def code(place: ir.Value, squares: list[ir.Value]) -> list[ir.Value]:
            value = write.load(write.at(x, place))
            near = write.fma(value, steps, write.constant(128.5))
            whole = build.fptoui(near, ir.VectorType(INT32, lanes))
            write.store(build.trunc(whole, bytes_), write.at(out, place))
            if not bounded:
                return squares
            taken = build.fsub(build.uitofp(whole, write.vector), write.constant(128.0))
            left = write.fma(build.fsub(write.zero, taken), scale, value)
            return [write.fma(one, one, total) for one, total in zip((value, left), squares, strict=True)]

        squares = write.summing(number(0), size, [write.zero] * (2 if bounded else 0), code, step=lanes)
        for place, total in enumerate(squares, 1):
            length = write.sqrt(write.broadcast(write.folded(total, build.fadd)))
            build.store(build.extract_element(length, ir.Constant(INT32, 0)), write.at(figures, number(place)))


def _write_rotary(write: Writer, *, rounded: bool) -> None:
    """Norm and rotation of queries and keys; queries to `q`, keys and values to their pages."""
    given, build = _given(write, RotaryArguments), write.build
    if rounded:
        given["storage"] = build.bitcast(given["storage"], HALF.as_pointer())
    size, heads, kv_heads = given["size"], given["heads"], given["kv_heads"]
    turned = build.add(heads, kv_heads)
    width = build.mul(build.add(turned, kv_heads), size)
    slots = build.bitcast(given["slots"], INT.as_pointer())
    with _rows(write, given) as row:
        source = write.at(given["qkv"], build.mul(row, width))
        q = write.at(given["q"], build.mul(row, build.mul(heads, size)))
        angles = build.mul(row, build.sdiv(size, number(2)))
        angles = tuple(write.at(given[name], angles) for name in ("cos", "sin"))
        page = write.at(given["storage"], build.mul(build.load(write.at(slots, row)), size))
        with write.counting(number(0), heads) as head:
            _turn(write, given, head, source, write.at(q, build.mul(head, size)), angles)
        with write.counting(heads, turned) as head:
            to = write.at(page, build.mul(build.sub(head, heads), given["head_stride"]))
            _turn(write, given, head, source, to, angles)
        with write.counting(turned, build.add(turned, kv_heads)) as head:
            to = write.at(page, build.mul(build.sub(head, heads), given["head_stride"]))
            value = write.at(source, build.mul(head, size))
            with write.counting(number(0), size, write.lanes) as place:
                write.store_any(write.load(write.at(value, place)), write.at(to, place))


def _write_copies(write: Writer) -> None:
    """Keys and values from slot to slot."""
    given, build = _given(write, CopyArguments), write.build
    source, to, count = (build.bitcast(given[name], INT.as_pointer()) for name in ("source", "to", "count"))
    given["rows"] = build.load(count)
    with _rows(write, given) as row, write.counting(number(0), given["heads"]) as head:
        own = write.at(given["storage"], build.mul(head, given["head_stride"]))
        places = (write.at(own, build.mul(build.load(write.at(at, row)), given["size"])) for at in (source, to))
        old, new = places
        with write.counting(number(0), given["size"], write.lanes) as place:
            write.store(write.load(write.at(old, place)), write.at(new, place))


def _write_turned(write: Writer) -> None:
    """Norm and rotation of every head."""
    given, build = _given(write, TurnedArguments), write.build
    size, heads = given["size"], given["heads"]
    with _rows(write, given) as row:
        source = write.at(given["x"], build.mul(row, given["stride"]))
        to = write.at(given["out"], build.mul(row, build.mul(heads, size)))
        angles = build.mul(row, build.sdiv(size, number(2)))
        angles = tuple(write.at(given[name], angles) for name in ("cos", "sin"))
        with write.counting(number(0), heads) as head:
            _turn(write, given, head, source, write.at(to, build.mul(head, size)), angles)


def _turn(
    write: Writer,
    given: Mapping[str, ir.Value],
    head: ir.Value,
    source: ir.Value,
    to: ir.Value,
    angles: tuple[ir.Value, ...],
) -> None:
    """A head's norm with its pairs (i, i + size / 2) rotated."""
    build, size = write.build, given["size"]
    x, weight = (write.at(rows, build.mul(head, size)) for rows in (source, given["weight"]))
    scale, half = _scale(write, x, size, given["eps"]), build.sdiv(size, number(2))

    def normed(place: ir.Value) -> ir.Value:
        value = build.fmul(write.load(write.at(x, place)), scale)
        return build.fmul(value, write.load(write.at(weight, place)))

    with write.counting(number(0), half, write.lanes) as place:
        behind = build.add(place, half)
        low, high = normed(place), normed(behind)
        cos, sin = (write.load(write.at(angle, place)) for angle in angles)
        write.store_any(build.fsub(build.fmul(low, cos), build.fmul(high, sin)), write.at(to, place))
        write.store_any(build.fadd(build.fmul(high, cos), build.fmul(low, sin)), write.at(to, behind))


def _write_activation(write: Writer, activation: Callable[[Writer, ir.Value], ir.Value]) -> None:
    """The activation of a gate times its up."""
    given, build = _given(write, ActivationArguments), write.build
    with _rows(write, given) as row:
        gates = write.at(given["x"], build.mul(row, given["stride"]))
        ups = write.at(gates, given["size"])
        out = write.at(given["out"], build.mul(row, given["size"]))
        with write.counting(number(0), given["size"], write.lanes) as place:
            gate, up = (write.load(write.at(rows, place)) for rows in (gates, ups))
            write.store(build.fmul(activation(write, gate), up), write.at(out, place))


def _silu(write: Writer, x: ir.Value) -> ir.Value:
    """Compute x / (1 + exp(-x))."""
    return _gate(write, x, x)


def _gelu_tanh(write: Writer, x: ir.Value) -> ir.Value:
    """Compute x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z)) with z = √(2/π) (x + 0.044715 x³)."""
    cube = write.build.fmul(write.build.fmul(x, x), x)
    inner = write.fma(cube, write.constant(_GELU_CUBE), x)
    return _gate(write, x, write.build.fmul(inner, write.constant(2 * _GELU_INNER)))


def _gate(write: Writer, x: ir.Value, z: ir.Value) -> ir.Value:
    return write.build.fdiv(x, write.build.fadd(write.constant(1.0), write.exp(write.build.fneg(z))))
