"""`dspark demo`: a real model in four processes, speculating, and the same prompt without speculation beside it."""

from __future__ import annotations

import typer

from dspark.cli import common, generate
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import DSparkError

app = typer.Typer(add_completion=False)

PROMPT = (
    "Question: A baker sells 24 rolls in the morning and twice as many in the afternoon. "
    "Each roll costs 2 dollars. How much money does the baker earn that day?\nAnswer:"
)


@app.command()
def demo(
    model: common.Model = DEFAULT_MODEL,
    drafter: common.Drafter = "default",
    log_dir: common.LogDir = None,
    as_json: common.AsJson = False,
) -> None:
    """Start a cluster, stream a completion, and measure it against plain decoding."""
    settings = common.ClusterSettings(model=model, drafter=drafter, log_dir=log_dir)
    first, plain = common.run(
        generate.show(settings, PROMPT, {"max_tokens": 96, "temperature": 0}, compare_plain=True, as_json=as_json)
    )
    if plain is None or plain.token_ids != first.token_ids:
        raise DSparkError("speculation changed the output, which it never may")
    if first.speculation.enabled and first.speculation.drafter and not first.speculation.accepted:
        raise DSparkError("no draft token was accepted: the draft worker is not doing its work")
