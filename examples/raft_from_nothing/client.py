"""A client: finds the leader, follows hints, and makes each command count once, however often it is sent."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from wire import Address, Link, Message, Unreachable

from fastsm import once, open_session


class OutcomeUnknown(Exception):
    """The command may have been applied, may still be applied later, or may never be."""


class Client:
    """Talks to a cluster. One request at a time; make one for each task."""

    def __init__(self, addresses: dict[str, Address], *, timeout: float = 2.0) -> None:
        self._links = {name: Link(address) for name, address in addresses.items()}
        self._turns = itertools.cycle(addresses)
        self._leader = next(self._turns)
        self._timeout = timeout
        self._session: int | None = None
        self._sequence = 0

    async def propose(self, command: bytes) -> Message:
        """Have a command applied; return its result's ``ok`` and ``value``. Raises ``OutcomeUnknown`` if none came."""
        return (await self._request({"type": "propose"}, command, again=False))[0]

    async def propose_once(self, command: bytes) -> Message:
        """Propose a command again and again until there is an answer: in a session it counts once."""
        if self._session is None:
            self._session = (await self._request({"type": "propose"}, open_session(), again=True))[0]["value"]
        self._sequence += 1
        return (await self._request({"type": "propose"}, once(self._session, self._sequence, command), again=True))[0]

    async def get(self, key: bytes) -> bytes | None:
        """Return the value of a key now: it includes every command that was answered before this call."""
        reply, value = await self._request({"type": "get"}, key, again=True)
        return value if reply["found"] else None

    async def change_members(self, members: list[str]) -> None:
        """Add or remove one node."""
        await self._request({"type": "members", "members": members}, b"", again=True)

    async def _request(self, message: Message, blob: bytes, *, again: bool) -> tuple[Message, bytes]:
        while True:
            reply: dict[str, Any]
            try:
                reply, value = await self._links[self._leader].call(message, blob, timeout=self._timeout)
            except Unreachable as error:
                self._leader = next(self._turns)
                if not again:
                    raise OutcomeUnknown(str(error)) from error
                await asyncio.sleep(0.02)
                continue
            if "done" in reply:
                return reply, value
            if "refused" in reply:
                raise ValueError(reply["refused"])
            if "unknown" in reply and not again:
                raise OutcomeUnknown(reply["unknown"])
            hint = reply.get("leader")
            self._leader = hint if hint in self._links and hint != self._leader else next(self._turns)
            await asyncio.sleep(0.02)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
