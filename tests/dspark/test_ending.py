"""Tasks end although something inside takes their cancellation for its own."""

import asyncio

from dspark.ending import end


async def stubborn(swallowed: int) -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if not swallowed:
                raise
            swallowed -= 1


async def test_cancellations_that_are_swallowed_are_repeated() -> None:
    tasks = [asyncio.create_task(stubborn(count)) for count in (0, 1, 2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await end(*tasks)
    assert all(task.cancelled() for task in tasks)
    await end(*tasks)
    await end()
