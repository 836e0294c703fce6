"""A limit on a client's requests per window of time, counted for all servers together.

>>> machine = fastsm.MemoryStateMachine(procedures=[allow])
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> request = allow_command("ann", limit=2, window_ms=60_000, now=1_000)
>>> [propose(request).ok for _ in range(3)]
[True, True, False]

A refusal carries the end of the window. A tick, which the leader proposes (``fastsm.Clock``), ends the window:

>>> propose(request)
Answer(ok=False, value=61000, reason='abort')
>>> propose(fastsm.tick(61_000))
Answer(ok=True, value=1, reason=None)
>>> propose(allow_command("ann", limit=2, window_ms=60_000, now=61_000))
Answer(ok=True, value=1, reason=None)
"""

from __future__ import annotations

import json
import time
from typing import Any

import fastsm


def allow_command(client: str, *, limit: int, window_ms: int, now: int | None = None) -> bytes:
    """Return the command that counts a request. ``now``: the server's time, in milliseconds since 1970."""
    now = time.time_ns() // 1_000_000 if now is None else now
    return fastsm.call("rate.allow", json.dumps([client, limit, window_ms, now]).encode())


@fastsm.procedure(name="rate.allow")
def allow(tx: Any, payload: bytes) -> int:
    """Return how many requests are left in this window; abort with the window's end if there are none.

    The time in the payload is the same on every replica; a clock that is read here would not be. It only sets the end
    of the window: a tick ends it. An ``add`` keeps the deadline of its key.
    """
    client, limit, window_ms, now = json.loads(payload)
    key = b"rate/" + client.encode()
    if tx.get(key) is None:
        tx.put(key, b"0", expires=max(now, tx.clock) + window_ms)
    used: int = tx.add(key, 1)
    if used > limit:
        raise fastsm.Abort(tx.deadline(key))
    return int(limit) - used
