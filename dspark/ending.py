"""Ending background tasks for good.

Some libraries take a cancellation for their own: one that meets redis-py in the middle of a command may be gone. The
task then runs on, and whoever waits for it waits for ever: a draft worker that should stop stayed.
"""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["end"]

_PATIENCE = 1.0  # seconds between cancellations: one that comes too soon cuts off what a task tidies up


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended, cancelling again those that went on."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_PATIENCE)
