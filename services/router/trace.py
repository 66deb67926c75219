"""What every round was expected to be and what it came to, a line of JSON each, for whoever studies the scheduler."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dspark.errors import ConfigError

__all__ = ["Trace"]

FLUSH_SECONDS = 1.0


class Trace:
    """A file that grows by a line a round, for `with`; without a path nothing is written.

    `ConfigError` where the file cannot be opened. A disk that fills up ends the trace, and nothing else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._flushed = 0.0

    def __enter__(self) -> Self:
        self._file = None
        if self._path is not None:
            try:
                self._file = self._path.open("a", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--trace {self._path}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return

    @property
    def on(self) -> bool:
        """Whether anybody wants lines."""
        return self._file is not None

    def write(self, **figures: Any) -> None:
        """One round."""
        if self._file is None:
            return
        now = time.time()
        try:
            self._file.write(json.dumps({"at": round(now, 4), **figures}) + "\n")
            if now - self._flushed > FLUSH_SECONDS:
                self._flushed = now
                self._file.flush()
        except OSError:
            self._file = None
