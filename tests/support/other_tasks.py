"""Another task of an event loop, which shows whether what is tested lets others run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def counting(turns: list[int]) -> AsyncIterator[None]:
    """Counts in `turns[0]` how often another task runs."""

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
