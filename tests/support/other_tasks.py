"""Another task of the event loop, which shows whether the tested code lets other tasks run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def counting(turns: list[int]) -> AsyncIterator[None]:
    """Count in `turns[0]` how often another task runs during the block."""

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(count())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
