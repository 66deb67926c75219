"""Files that appear whole or not at all, so that no reader ever trusts half of one; and one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError

__all__ = ["alone", "whole", "write_json"]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends well.

    Otherwise nothing is left of it; `ConfigError` where the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write an object readably, as `whole` does."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait. `path` is a file made for this and left where it is.

    File systems that know no locks let everybody in.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
