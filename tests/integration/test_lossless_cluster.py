"""Whatever is drafted, verified, batched or added: coupled tokens are the target's own, through real processes."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from support.clusters import ClusterOf

from dspark.client import Client
from dspark.events import Completion, Speculation

VOCAB, NEW = 96, 40
RANDOM = random.Random(7)
PROMPTS = [[2, *RANDOM.choices(range(3, VOCAB), k=RANDOM.randint(1, 60))] for _ in range(16)]


async def complete(
    client: Client, index: int, *, cap: int | None = None, mode: str = "coupled", policy: str = "", **more: int
) -> Completion:
    return await client.complete(
        PROMPTS[index],
        max_tokens=NEW,
        temperature=more.get("temperature", 1),
        seed=1000 + index + more.get("other_seed", 0),
        ignore_eos=True,
        mode=mode,
        speculation=cap != 0,
        max_verify_length=cap,
        policy=policy,
    )


async def crowd(client: Client, *caps: int | None, policies: Sequence[str] = ("",)) -> list[Completion]:
    own = [(caps[i % len(caps)], policies[i % len(policies)]) for i in range(len(PROMPTS))]
    return await asyncio.gather(*(complete(client, i, cap=cap, policy=name) for i, (cap, name) in enumerate(own)))


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("one_process", [False, True])
async def test_coupled_tokens_depend_on_prompt_seed_and_target_alone(cluster_of: ClusterOf, one_process: bool) -> None:
    async with cluster_of(drafter="none") as cluster, cluster.client() as client:
        own = ids([await complete(client, i) for i in range(len(PROMPTS))])
    assert all(len(tokens) == NEW for tokens in own)

    async with cluster_of(verify_length=7, together=one_process) as cluster, cluster.client() as client:
        alone = [[await complete(client, i, cap=cap) for cap in (0, 1, 3, 7)] for i in range(4)]
        assert [ids(runs) for runs in alone] == [[tokens] * 4 for tokens in own[:4]]
        assert ids(await crowd(client, 7)) == own
        assert await cluster.add_draft() == "draft-2"
        together = await crowd(client, 7, 1, 0, 3)
        assert ids(together) == own
        assert all(status.rounds > 0 for status in (await client.loads()).workers)

        counts = Speculation.total(run.speculation for run in [*together, *(r for runs in alone for r in runs)])
        assert counts.drafted >= counts.verified > 0
        assert counts.accepted > 100
        assert counts.rejected > 100

        # What the comparison is worth: a mode whose tokens do depend on drafts, and another seed, do not pass it.
        assert ids([await complete(client, i, mode="rejection") for i in range(4)]) != own[:4]
        assert (await complete(client, 0, other_seed=1)).token_ids != own[0]


async def test_greedy_is_the_same_in_both_modes_and_without_drafts(cluster_of: ClusterOf) -> None:
    async with cluster_of(verify_length=7) as cluster, cluster.client() as client:
        runs = [
            [
                (await complete(client, i, cap=cap, mode=mode, temperature=0)).token_ids
                for cap, mode in ((0, "coupled"), (7, "coupled"), (7, "rejection"))
            ]
            for i in range(6)
        ]
        assert all(len(set(tokens)) == 1 for tokens in runs)
        assert len({tokens[0] for tokens in runs}) > 1


async def test_what_the_scheduler_decides_changes_no_token(cluster_of: ClusterOf) -> None:
    """Measured costs, live confidences, exploring: coupled tokens are those of plain decoding at any load."""
    async with cluster_of(drafter="none") as cluster, cluster.client() as client:
        own = ids([await complete(client, i) for i in range(len(PROMPTS))])
    measured = ("--profile", "measure", "--profile-seconds", "3")
    scheduled = cluster_of(policy="adaptive", router_args=("--explore", "0.2"), both=measured)
    async with scheduled as cluster, cluster.client() as client:
        runs = [[await complete(client, 0)], [await complete(client, 1)], await crowd(client, None)]
        mixed = await crowd(client, None, policies=("adaptive", "fixed:7", "threshold:0.2", "cap-accept"))
        assert [runs[0][0].token_ids, runs[1][0].token_ids] == own[:2]
        assert ids(runs[2]) == ids(mixed) == own
        counts = Speculation.total(run.speculation for several in (*runs, mixed) for run in several)
        assert counts.turned < counts.alternatives
        assert (await client.describe()).policy == "adaptive"
        assert ids([await complete(client, i, mode="rejection", policy="fixed:7") for i in range(4)]) != own[:4]
    assert counts.accepted > 20
    assert counts.rejected > 20
