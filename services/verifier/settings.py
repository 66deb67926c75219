"""The verify worker's settings: flags, or environment variables with the prefix DSPARK_."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import uuid4

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings"]


class Settings(BaseSettings):
    """Serves a target model: verifies drafts, commits tokens, hands out features."""

    model_config = SettingsConfigDict(
        env_prefix="DSPARK_",
        cli_prog_name="python -m services.verifier",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        extra="ignore",
    )

    model: Annotated[str, Field(description="Model directory, GGUF file, or the name of a pulled model")]
    store: Annotated[str, Field(description="Store URL, redis://host:port")]
    listen: Annotated[str, Field(description="Address to serve on; port 0 picks a free one")] = "127.0.0.1:0"
    advertise: Annotated[str, Field(description="Host under which others reach this worker")] = ""
    device: Annotated[str, Field(description="cpu, cuda, cuda:N, or auto: a GPU if there is one")] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="What products multiply; auto: bfloat16 where the device multiplies it fast"),
    ] = "auto"
    weights: Annotated[
        Literal["plain", "int8"],
        Field(description="int8: round matrices to half their bytes (AVX512-VNNI); outputs are then that model's own"),
    ] = "plain"
    kernels: Annotated[Literal["auto", "torch", "llvm", "triton"], Field(description="Kernel implementations")] = "auto"
    pages: Annotated[int, Field(ge=2, description="K/V cache pages")] = 2048
    page_size: Annotated[int, Field(ge=1, le=1024, description="Positions of one page")] = 16
    prefix_cache: Annotated[bool, Field(description="Reuse K/V of equal beginnings")] = True
    threads: Annotated[int, Field(ge=0, description="CPU threads of the model; 0: as many as there are cores")] = 0
    bind_threads: Annotated[bool, Field(description="Each CPU thread on its own core, if there are as many")] = True
    max_step_tokens: Annotated[int, Field(ge=1, le=2048, description="Rows of one forward")] = 512
    noise_candidates: Annotated[
        int, Field(ge=1, le=4096, description="Tokens with noise of their own; changes outputs")
    ] = 256
    feature_queue_mib: Annotated[int, Field(ge=1, description="Bound of each draft worker's feature queue")] = 8
    profile: Annotated[
        Literal["auto", "measure", "off"],
        Field(description="Step costs: auto takes the kept ones, else measures; off leaves routers without"),
    ] = "auto"
    profile_seconds: Annotated[float, Field(gt=0, description="How long measuring step costs may take")] = 8.0
    metrics_port: Annotated[int, Field(ge=0, le=65535, description="Prometheus endpoint; 0 picks a free one")] = 0
    metrics_host: Annotated[str, Field(description="Address of the Prometheus endpoint")] = "127.0.0.1"
    drain_seconds: Annotated[float, Field(ge=0, description="After SIGTERM, how long sequences may take")] = 30.0
    worker_id: Annotated[str, Field(description="Name in the store")] = Field(
        default_factory=lambda: f"verify-{uuid4().hex[:8]}"
    )
    log_level: Annotated[str, Field(description="debug, info, warning, error")] = "info"
