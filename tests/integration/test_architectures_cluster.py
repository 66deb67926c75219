"""Every kind of drafter in a cluster of real processes: coupled tokens are the target's own, whoever drafts."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from support import drafters
from support.clusters import ClusterOf

from dspark.client import Client
from dspark.events import Completion, Speculation

NEW = 40
RANDOM = random.Random(11)
PROMPTS = [[2, *RANDOM.choices(range(3, drafters.VOCAB), k=RANDOM.randint(1, 50))] for _ in range(8)]
SETTINGS: list[dict[str, Any]] = [{"temperature": 1}, {"temperature": 1, "top_k": 2}, {"temperature": 0}]
"""Flat, where the shared noise makes random drafters right at times; and narrow, where texts repeat themselves."""


async def crowd(client: Client, **more: Any) -> list[Completion]:
    return await asyncio.gather(
        *(
            client.complete(prompt, max_tokens=NEW, seed=number, ignore_eos=True, **SETTINGS[number % 3], **more)
            for number, prompt in enumerate(PROMPTS)
        )
    )


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("architecture", ["dflash", "eagle3", "mtp", "ngram"])
async def test_coupled_tokens_are_those_of_plain_decoding(
    cluster_of: ClusterOf, architecture: str, tmp_path: Path
) -> None:
    drafter = architecture if architecture == "ngram" else drafters.save_random(tmp_path, architecture)
    async with cluster_of(drafter=drafter, verify_length=7) as cluster, cluster.client() as client:
        own = ids(await crowd(client, speculation=False))
        assert all(len(tokens) == NEW for tokens in own)
        alone = [await client.complete(PROMPTS[0], max_tokens=NEW, seed=0, ignore_eos=True, **SETTINGS[0])]
        together = await crowd(client)
        assert ids(alone) == own[:1]
        assert ids(together) == own

        counts = Speculation.total(run.speculation for run in together)
        assert counts.drafter == architecture
        assert counts.drafted >= counts.verified > 0
        assert counts.accepted > 10
        assert counts.rejected > 10
        assert counts.missed_rounds < counts.rounds / 2

        rejection = await crowd(client, mode="rejection")
        assert all(len(run.token_ids) == NEW for run in rejection)
        assert ids(rejection)[2::3] == own[2::3]  # greedy: the mode makes no difference
        assert ids(rejection) != own
        counts = Speculation.total(run.speculation for run in rejection)
        assert counts.accepted > 0
        assert counts.rejected > 0
