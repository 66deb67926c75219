"""`dspark up`: a cluster on this machine until it is stopped."""

from __future__ import annotations

import enum
import json
from typing import Annotated

import typer

from dspark.cli import common
from dspark.cluster import DEFAULT_MODEL, Cluster

app = typer.Typer(add_completion=False)


class Weights(enum.Enum):
    """How verify workers keep the target's matrices."""

    PLAIN = "plain"
    INT8 = "int8"


class DraftWeights(enum.Enum):
    """How draft workers keep their drafter's matrices."""

    AUTO = "auto"
    PLAIN = "plain"
    INT8 = "int8"


@app.command()
def up(
    model: common.Model = DEFAULT_MODEL,
    drafter: common.Drafter = "default",
    draft: common.Draft = 1,
    verify: common.Verify = 1,
    together: common.Together = None,
    listen: Annotated[str, typer.Option(help="Where the router listens, HOST:PORT.")] = "127.0.0.1:50051",
    store: Annotated[
        str | None, typer.Option(help="URL of a running Redis or Valkey; none: one of our own.", envvar="DSPARK_STORE")
    ] = None,
    policy: common.PolicyName = None,
    verify_length: common.VerifyLength = None,
    dtype: common.Dtype = None,
    weights: Annotated[
        Weights | None,
        typer.Option(help="plain, or int8: half the bytes, on a CPU; outputs are then that model's own."),
    ] = None,
    draft_weights: Annotated[
        DraftWeights | None,
        typer.Option(help="Of drafters; auto: int8 where the processor multiplies it, and bfloat16 otherwise."),
    ] = None,
    log_dir: common.LogDir = None,
    trace: common.Trace = None,
    as_json: common.AsJson = False,
) -> None:
    """Start store, router, draft and verify workers on this machine, and serve until stopped (Ctrl-C)."""
    settings = common.ClusterSettings(
        model=model,
        drafter=drafter,
        draft=draft,
        verify=verify,
        policy=policy,
        verify_length=verify_length,
        dtype=dtype,
        log_dir=log_dir,
        trace=trace,
        together=together,
        verify_args=("--weights", weights.value) if weights else (),
        draft_args=("--draft-weights", draft_weights.value) if draft_weights else (),
    )
    common.run(_serve(settings, settings.cluster(listen=listen, store=store), as_json=as_json))


async def _serve(settings: common.ClusterSettings, cluster: Cluster, *, as_json: bool) -> None:
    with common.notes.status("Starting the cluster …"):
        await cluster.__aenter__()
    try:
        common.note_drafter(cluster, settings)
        facts = {
            "address": cluster.address,
            "store": cluster.store_url,
            "workers": list(cluster.workers),
            "drafter": None if cluster.drafter is None else str(cluster.drafter),
            "logs": str(cluster.log_dir),
        }
        if as_json:
            typer.echo(json.dumps(facts))
        else:
            common.notes.print(f"Router on [bold]{cluster.address}[/], store {cluster.store_url}.")
            common.notes.print(f"Workers: {', '.join(cluster.workers)}. Logs in {cluster.log_dir}. Ctrl-C stops.")
        await cluster.watch(lambda ending: common.notes.print(ending, style="red", markup=False))
    finally:
        await cluster.__aexit__(None, None, None)
