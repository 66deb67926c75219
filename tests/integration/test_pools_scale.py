"""Pools grow and shrink while streams run: no error, no other token, and newcomers take work."""

import asyncio
import random

from support.clusters import ClusterOf

from dspark.client import Client
from dspark.cluster import Cluster
from dspark.events import Completion

RANDOM = random.Random(3)
PROMPTS = [[2, *RANDOM.choices(range(3, 96), k=RANDOM.randint(4, 30))] for _ in range(16)]


async def complete(client: Client, index: int, tokens: int = 120) -> Completion:
    return await client.complete(PROMPTS[index], max_tokens=tokens, temperature=0, ignore_eos=True)


async def change_pools(cluster: Cluster) -> None:
    await asyncio.sleep(1)
    assert await cluster.add_draft() == "draft-2"
    await asyncio.sleep(1)
    assert await cluster.stop("draft-1") == 0
    assert await cluster.add_verify() == "verify-2"


async def keep_busy(client: Client, index: int, changes: asyncio.Task[None]) -> list[Completion]:
    """One stream after another until the pools have changed, and one more."""
    runs = []
    while not changes.done():
        runs.append(await complete(client, index))
    return [*runs, await complete(client, index)]


async def test_sixteen_streams_do_not_notice_workers_coming_and_going(cluster_of: ClusterOf) -> None:
    async with cluster_of(verify_length=3) as cluster, cluster.client() as client:
        expected = [(await complete(client, i)).token_ids for i in range(len(PROMPTS))]
        changes = asyncio.create_task(change_pools(cluster))
        runs = await asyncio.gather(*(keep_busy(client, i, changes) for i in range(len(PROMPTS))))
        await changes
        shares = {status.worker_id: (status.rounds, status.tokens) for status in (await client.loads()).workers}
    print("rounds and tokens of each worker:", shares)
    for own, want in zip(runs, expected, strict=True):
        assert {run.token_ids for run in own} == {want}
    assert set(shares) == {"draft-2", "verify-1", "verify-2"}
    assert all(rounds > 0 for rounds, _ in shares.values())
    assert sum(run.speculation.accepted for own in runs for run in own) > 0
