"""The services on a card, with the kernels that `auto` picks there: what was drafted decides no token."""

import asyncio

import pytest
from support.clusters import ClusterOf

from dspark.client import Client
from dspark.events import Completion, Speculation

pytestmark = pytest.mark.gpu
PROMPTS = [[2, *range(3 + n, 40 + 5 * n, 1 + n)] for n in range(6)]


async def complete(client: Client, index: int, *, cap: int | None, temperature: float) -> Completion:
    return await client.complete(
        PROMPTS[index],
        max_tokens=40,
        temperature=temperature,
        seed=1000 + index,
        ignore_eos=True,
        mode="coupled",
        speculation=cap != 0,
        max_verify_length=cap,
    )


async def drafts_come(client: Client, temperature: float) -> None:
    """Until the drafter's kernels are compiled, rounds go on without drafts: half a minute, where no cache has them."""
    async with asyncio.timeout(120):
        while not (await complete(client, 0, cap=7, temperature=temperature)).speculation.drafted:
            pass


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_tokens_do_not_depend_on_drafts_or_company(
    cluster_of: ClusterOf, monkeypatch: pytest.MonkeyPatch, kernels: str, temperature: float
) -> None:
    """By our own kernels; torch's products pick their order by the number of rows, and promise nothing on a card."""
    monkeypatch.setenv("DSPARK_DEVICE", "cuda")
    monkeypatch.setenv("DSPARK_KERNELS", kernels)
    async with cluster_of(verify_length=7) as cluster, cluster.client() as client:
        await drafts_come(client, temperature)
        runs = [
            await asyncio.gather(*(complete(client, i, cap=cap, temperature=temperature) for i in range(len(PROMPTS))))
            for cap in (0, 1, 7)
        ]
        alone = await complete(client, 0, cap=3, temperature=temperature)
        assert all(len(run.token_ids) == 40 for each in runs for run in each)
        assert Speculation.total(run.speculation for run in runs[2]).accepted > 0
        if kernels == "triton":
            tokens = [[run.token_ids for run in each] for each in runs]
            assert tokens[0] == tokens[1] == tokens[2]
            assert alone.token_ids == tokens[0][0]
