"""Hidden states of a data set's texts on disk, never more than a given size.

One file of fixed places: a text whose place lies under the bound is kept once computed, the others never. An entry
counts only with its checksum, written after it, so that a killed process leaves nothing that another would believe.
Several processes may share a cache, and begin it at the same time; they write the same bytes. A cache of other texts
or layers is thrown away.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.files import alone

__all__ = ["StateCache", "StateCaches", "States", "TextStates"]


class TextStates(NamedTuple):
    """Of one text: `captured` (t, m, d) and `hidden` (t, d) bfloat16, `logz` (t,) float32."""

    captured: Tensor
    hidden: Tensor
    logz: Tensor


class States(Protocol):
    """States of texts by number, as far as there is room for them."""

    @property
    def bytes(self) -> int:
        """What they take, or will."""

    def get(self, text: int) -> TextStates | None:
        """The text's states, if they are here and whole."""

    def put(self, text: int, states: TextStates) -> None:
        """Keep them, if the text has a place."""


class StateCache:
    """A text's states by its number."""

    def __init__(
        self,
        directory: Path,
        identity: dict[str, Any],
        lengths: Sequence[int],
        *,
        layers: int,
        width: int,
        gigabytes: float,
    ) -> None:
        """`identity` says what the states are of, `lengths` are the texts' in tokens. `ConfigError` without room."""
        self._layers, self._width = layers, width
        self._row = (layers + 1) * width + 2  # of 16-bit words; the last two hold log Z
        ends = np.cumsum(lengths, dtype=np.int64)
        self._starts = ends - np.asarray(lengths)
        self.texts = len(lengths)
        self._ends = ends
        self.kept = int(np.searchsorted(ends * self._row * 2, gigabytes * 1e9, side="right"))
        """Texts that have a place."""
        self.bytes = int(ends[self.kept - 1]) * self._row * 2 if self.kept else 0
        if self.kept:
            self._open(directory, identity)

    def get(self, text: int) -> TextStates | None:
        """The text's states, if they are here and whole."""
        if text >= self.kept or not self._sums[text]:
            return None
        words = self._words[self._starts[text] : self._ends[text]]
        if _checksum(words) != self._sums[text]:
            return None
        rows = torch.from_numpy(np.ascontiguousarray(words))
        states = rows[:, :-2].view(torch.bfloat16).view(len(rows), self._layers + 1, self._width)
        logz = rows[:, -2:].contiguous().view(torch.float32)[:, 0]
        return TextStates(states[:, :-1], states[:, -1], logz)

    def put(self, text: int, states: TextStates) -> None:
        """Keep them, if the text has a place."""
        if text >= self.kept:
            return
        rows = torch.cat([states.captured.flatten(1), states.hidden], 1).view(torch.int16)
        words = torch.cat([rows, states.logz[:, None].contiguous().view(torch.int16)], 1).cpu().numpy()
        self._sums[text] = 0
        self._words[self._starts[text] : self._ends[text]] = words
        self._sums[text] = _checksum(words)

    def _open(self, directory: Path, identity: dict[str, Any]) -> None:
        facts = json.dumps(
            {**identity, "row": self._row, "kept": self.kept, "tokens": int(self._ends[self.kept - 1])}, sort_keys=True
        )
        name = directory / "states.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with alone(directory / "states.lock"):
                if not (name.exists() and name.read_text(encoding="utf-8") == facts):
                    self._reserve(directory)
                    name.write_text(facts, encoding="utf-8")
                self._words = np.memmap(
                    directory / "states.bin", np.int16, "r+", shape=(int(self._ends[self.kept - 1]), self._row)
                )
                self._sums = np.memmap(directory / "states.sum", np.uint32, "r+", shape=(self.kept,))
        except (OSError, ValueError) as error:
            raise ConfigError(f"state cache {directory}: {error}") from error

    def _reserve(self, directory: Path) -> None:
        """Empty files of full size: no room is an error now and not a crash in the middle.

        They are new ones: who still uses the cache that was here keeps what it has mapped, alone.
        """
        for name in ("states.json", "states.sum", "states.bin"):
            (directory / name).unlink(missing_ok=True)
        for name, size in (("states.sum", 4 * self.kept), ("states.bin", self.bytes)):
            with (directory / name).open("wb") as file:
                _allocate(file.fileno(), size)


class StateCaches:
    """The caches of several data sets, whose texts are numbered one after the other."""

    def __init__(self, parts: Sequence[StateCache]) -> None:
        self._parts = parts
        self.bytes = sum(part.bytes for part in parts)

    def get(self, text: int) -> TextStates | None:
        """As `StateCache.get`."""
        part, own = self._place(text)
        return part.get(own)

    def put(self, text: int, states: TextStates) -> None:
        """As `StateCache.put`."""
        part, own = self._place(text)
        part.put(own, states)

    def _place(self, text: int) -> tuple[StateCache, int]:
        for part in self._parts:
            if text < part.texts:
                return part, text
            text -= part.texts
        raise IndexError(text)


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _checksum(words: np.ndarray[Any, np.dtype[np.int16]]) -> int:
    return zlib.crc32(np.ascontiguousarray(words).tobytes()) or 1
