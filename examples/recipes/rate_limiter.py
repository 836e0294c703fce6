"""So many requests of a client in so much time, counted for all servers together.

>>> machine = fastsm.MemoryStateMachine(procedures=[allow])
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> request = allow_command("ann", limit=2, window_ms=60_000, now=1_000)
>>> [propose(request).ok for _ in range(3)]
[True, True, False]

What is refused says until when. A tick, which the leader proposes (``fastsm.Clock``), ends the window:

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
    """The command that counts a request. ``now``: the server's time, in milliseconds since 1970."""
    now = time.time_ns() // 1_000_000 if now is None else now
    return fastsm.call("rate.allow", json.dumps([client, limit, window_ms, now]).encode())


@fastsm.procedure(name="rate.allow")
def allow(tx: Any, payload: bytes) -> int:
    """Answers how many requests are left in this window; aborts with its end where there is none.

    The time in the payload is the same on every replica, as that of a clock read here would not be. It only says how
    long the window is to last: a tick ends it. An ``add`` keeps the deadline of its key.
    """
    client, limit, window_ms, now = json.loads(payload)
    key = b"rate/" + client.encode()
    if tx.get(key) is None:
        tx.put(key, b"0", expires=max(now, tx.clock) + window_ms)
    used: int = tx.add(key, 1)
    if used > limit:
        raise fastsm.Abort(tx.deadline(key))
    return int(limit) - used
