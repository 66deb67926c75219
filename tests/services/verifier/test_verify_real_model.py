"""The real model in bfloat16: drafts, company and cut prompts change no token."""

import pytest
import torch
from support.verifying import Stream, drive, garbage, make_engine, oracle

from dspark.messages import Sampling
from dspark.models.pull import resolve_model

PROMPT = [2, 818, 5279, 529, 7001, 563, 9079, 236761, 108, 818, 5279, 529, 9405, 563]


@pytest.mark.model
def test_tokens_do_not_depend_on_drafts_or_company() -> None:
    engine = make_engine(resolve_model("gemma-3-270m"), dtype=torch.bfloat16, prefix_cache=False)
    kinds = [Sampling(temperature=0.0), Sampling(temperature=1.0, seed=5)]
    alone = [Stream(engine, "alone", PROMPT, sampling=kind, new=10).run() for kind in kinds]
    crowd = [
        Stream(engine, f"{i}{k}", PROMPT, sampling=kinds[i], new=10, piece=9, drafts=drafts)
        for i in range(2)
        for k, drafts in enumerate((garbage(3), oracle(PROMPT, alone[i], 5, wrong_every=4)))
    ]
    drive(engine, crowd)
    assert [stream.output for stream in crowd] == [alone[0], alone[0], alone[1], alone[1]]
    assert crowd[0].accepted < crowd[0].proposed
    assert 0 < crowd[1].accepted < crowd[1].proposed
