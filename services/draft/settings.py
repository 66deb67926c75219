"""The draft worker's settings: flags, or environment variables with the prefix DSPARK_."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings"]


class Settings(BaseSettings):
    """Serves a drafter: proposes blocks of tokens, from features and token ids that verify workers send."""

    model_config = SettingsConfigDict(
        env_prefix="DSPARK_",
        cli_prog_name="python -m services.draft",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        extra="ignore",
    )

    drafter: Annotated[
        Path, Field(description="Drafter directory (config.json, model.safetensors), or ngram: prompt lookup")
    ]
    target: Annotated[
        str, Field(description="Its target's directory, GGUF file or name: embedding and head, if the drafter has none")
    ] = ""
    store: Annotated[str, Field(description="Store URL, redis://host:port")]
    listen: Annotated[str, Field(description="Address to serve on; port 0 picks a free one")] = "127.0.0.1:0"
    advertise: Annotated[str, Field(description="Host under which others reach this worker")] = ""
    device: Annotated[str, Field(description="cpu, cuda, cuda:N, or auto: a GPU if there is one")] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="What products multiply; auto: bfloat16 where the device multiplies it fast"),
    ] = "auto"
    draft_weights: Annotated[
        Literal["auto", "plain", "int8"],
        Field(description="int8: round matrices to half their bytes (AVX512-VNNI); auto: where bfloat16 is multiplied"),
    ] = "auto"
    kernels: Annotated[Literal["auto", "torch", "llvm", "triton"], Field(description="Kernel implementations")] = "auto"
    context_positions: Annotated[int, Field(ge=16, description="Room for context K/V, all sequences")] = 131_072
    draft_top_k: Annotated[int, Field(ge=1, le=1024, description="Most likely tokens that a draft is drawn from")] = 64
    lookup: Annotated[
        bool, Field(description="Copy what repeats, where that came true before, whatever the drafter")
    ] = True
    threads: Annotated[int, Field(ge=0, description="CPU threads of the model; 0: as many as there are cores")] = 0
    bind_threads: Annotated[bool, Field(description="Each CPU thread on its own core, if there are as many")] = True
    connect_seconds: Annotated[float, Field(gt=0, description="How long an attach may wait for its verifier")] = 5.0
    profile: Annotated[
        Literal["auto", "measure", "off"],
        Field(description="Step costs: auto takes the kept ones, else measures; off leaves routers without"),
    ] = "auto"
    profile_seconds: Annotated[float, Field(gt=0, description="How long measuring step costs may take")] = 8.0
    metrics_port: Annotated[int, Field(ge=0, le=65535, description="Prometheus endpoint; 0 picks a free one")] = 0
    metrics_host: Annotated[str, Field(description="Address of the Prometheus endpoint")] = "127.0.0.1"
    drain_seconds: Annotated[float, Field(ge=0, description="After SIGTERM, how long sequences may take")] = 30.0
    worker_id: Annotated[str, Field(description="Name in the store")] = Field(
        default_factory=lambda: f"draft-{uuid4().hex[:8]}"
    )
    log_level: Annotated[str, Field(description="debug, info, warning, error")] = "info"
