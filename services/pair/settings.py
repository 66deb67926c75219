"""The settings of both workers of a process: flags, or environment variables with the prefix DSPARK_."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self
from uuid import uuid4

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.draft.settings import Settings as DraftSettings
from services.verifier.settings import Settings as VerifySettings

__all__ = ["Settings"]


class Settings(VerifySettings, DraftSettings):
    """Serves a target model and a drafter of it on the same cores. What both have is set once."""

    model_config = SettingsConfigDict(
        env_prefix="DSPARK_",
        cli_prog_name="python -m services.pair",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        extra="ignore",
    )

    worker_id: Annotated[str, Field(description="Name of the verify worker in the store")] = Field(
        default_factory=lambda: f"verify-{uuid4().hex[:8]}"
    )
    draft_worker_id: Annotated[str, Field(description="Name of the draft worker in the store")] = Field(
        default_factory=lambda: f"draft-{uuid4().hex[:8]}"
    )
    draft_metrics_port: Annotated[
        int, Field(ge=0, le=65535, description="Prometheus endpoint of the draft worker; 0 picks a free one")
    ] = 0

    def of_drafter(self, target: Path) -> Self:
        """As the draft worker reads them, beside the target at this place."""
        own = {"worker_id": self.draft_worker_id, "metrics_port": self.draft_metrics_port, "target": str(target)}
        return self.model_copy(update=own)
