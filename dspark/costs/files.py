"""Profiles on this machine's disk, one file a fingerprint, and one measurement at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from dspark.costs.profile import CostProfile

__all__ = ["alone", "loading", "profiles_dir", "read_profile", "write_profile"]

_POLL_SECONDS = 0.1

_log = structlog.get_logger(__name__)


def profiles_dir() -> Path:
    """Where profiles are kept: $DSPARK_CACHE/profiles, else ~/.cache/dspark/profiles."""
    cache = os.environ.get("DSPARK_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "dspark") / "profiles"


def read_profile(fingerprint: str) -> CostProfile | None:
    """The kept profile; None where there is none that can be read."""
    path = _path(fingerprint)
    try:
        profile = CostProfile.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("a cost profile that cannot be read", path=str(path), reason=str(error))
        return None
    return profile if profile.fingerprint == fingerprint else None


def write_profile(profile: CostProfile) -> None:
    """Keep a profile; it appears whole or not at all. A disk that takes nothing is logged, no error."""
    path = _path(profile.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(profile.to_json())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("the cost profile could not be kept", path=str(path), reason=str(error))


@contextlib.contextmanager
def alone(seconds: float) -> Iterator[None]:
    """Holds off other processes' measurements on this machine, and waits for what they load; at most so long.

    Workers of one machine start together, and each would measure the other's measuring, or its loading.
    """
    deadline = time.monotonic() + seconds
    with _open(".measuring") as measuring, _open(".loading") as loaded:
        _wait_for(measuring, deadline)
        _wait_for(loaded, deadline)
        if loaded is not None:
            fcntl.flock(loaded, fcntl.LOCK_UN)
        yield


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around heavy work that others' measurements had better wait for. Waits for none of them itself."""
    with _open(".loading") as loaded:
        if loaded is not None:
            fcntl.flock(loaded, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _open(name: str) -> Iterator[int | None]:
    """A file to lock; None on a disk that takes nothing."""
    directory = profiles_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / name).open("w")
    except OSError:
        yield None
        return
    with file:
        yield file.fileno()


def _wait_for(lock: int | None, deadline: float) -> None:
    while lock is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_SECONDS)
        else:
            return


def _path(fingerprint: str) -> Path:
    return profiles_dir() / f"{fingerprint}.json"
