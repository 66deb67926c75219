"""`dspark demo`: a real model in four processes, speculating, and the same prompt without speculation beside it."""

from __future__ import annotations

import typer

from dspark.cli import common, generate
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import DSparkError
from dspark.params import GenerateParams

app = typer.Typer(add_completion=False)

PROMPT = (
    "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?\nAnswer:"
)
# Neither greedy, where a small base model soon repeats itself, nor so random that it rambles.
PARAMS: GenerateParams = {"max_tokens": 96, "temperature": 0.6, "seed": 1}


@app.command()
def demo(
    model: common.Model = DEFAULT_MODEL,
    drafter: common.Drafter = "default",
    log_dir: common.LogDir = None,
    as_json: common.AsJson = False,
) -> None:
    """Start a cluster, stream a completion, and measure it against plain decoding."""
    settings = common.ClusterSettings(model=model, drafter=drafter, log_dir=log_dir, together=False)
    first, plain = common.run(generate.show(settings, PROMPT, PARAMS, compare_plain=True, as_json=as_json))
    if plain is None or plain.token_ids != first.token_ids:
        raise DSparkError("speculation changed the output, which it never may")
    if first.speculation.enabled and first.speculation.drafter and not first.speculation.accepted:
        raise DSparkError("no draft token was accepted: the draft worker is not doing its work")
