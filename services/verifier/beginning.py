"""How a program that serves a target begins: what can be told at once is told before torch loads."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic_settings import CliApp

from dspark import program
from dspark.models.pull import resolve_model
from dspark.store import check_store
from dspark.telemetry import configure_logging
from services.verifier.settings import Settings

__all__ = ["begin"]

SettingsT = TypeVar("SettingsT", bound=Settings)


def begin(kind: type[SettingsT], name: str) -> tuple[SettingsT, Path]:
    """Settings from flags and environment, and where their model lies. `StartupError` where there is none, or no store.

    `name`: of the program in its logs.
    """
    settings = CliApp.run(kind)
    configure_logging(name, level=settings.log_level, worker_id=settings.worker_id)
    check_store(settings.store)
    path = resolve_model(settings.model)
    program.wait_briefly()
    return settings, path
