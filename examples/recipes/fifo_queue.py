"""A queue: jobs in the order of the log, each claimed by one worker, and by another one if that worker dies.

>>> machine = fastsm.MemoryStateMachine(procedures=PROCEDURES)
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> [propose(push_command("mail", job)).value for job in (b"to ann", b"to bob")]
[1, 2]
>>> propose(claim_command("mail", "worker 1", lease_ms=30_000, now=1_000)).value
[1, b'to ann']
>>> propose(claim_command("mail", "worker 2", lease_ms=30_000, now=1_000)).value
[2, b'to bob']
>>> propose(claim_command("mail", "worker 3", lease_ms=30_000, now=1_000))
Answer(ok=False, value=None, reason='abort')

A worker acknowledges a finished job. If it does not, because it died, a tick removes its claim:

>>> propose(acknowledge_command("mail", "worker 1", 1)).ok
True
>>> propose(fastsm.tick(31_000)).value
1
>>> propose(claim_command("mail", "worker 3", lease_ms=30_000, now=31_000)).value
[2, b'to bob']
>>> propose(acknowledge_command("mail", "worker 2", 2)).ok         # too late: another worker has it
False

So a job is done at least once. Its side effects should be harmless if they happen twice.
"""

from __future__ import annotations

import json
import time
from typing import Any

import fastsm


def push_command(queue: str, job: bytes) -> bytes:
    """Return the command that puts a job at the end of a queue."""
    if "/" in queue:
        raise ValueError(f"queue {queue!r}: expected a name without a slash, which separates it from the rest")
    return fastsm.call("queue.push", queue.encode() + b"/" + job)


def claim_command(queue: str, worker: str, *, lease_ms: int, now: int | None = None) -> bytes:
    """Return the command that claims the first free job. ``now``: the worker's time, in milliseconds since 1970."""
    now = time.time_ns() // 1_000_000 if now is None else now
    return fastsm.call("queue.claim", json.dumps([queue, worker, lease_ms, now]).encode())


def acknowledge_command(queue: str, worker: str, number: int) -> bytes:
    """Return the command that removes a job which its worker has finished."""
    claim = claim_key(queue, number)
    return fastsm.transaction(
        [fastsm.value_is(claim, worker.encode())], [fastsm.delete(claim), fastsm.delete(job_key(queue, number))])


def keep_command(queue: str, worker: str, number: int, expires: int) -> bytes:
    """Return the command that extends a claim, for a job that takes longer."""
    claim = claim_key(queue, number)
    return fastsm.transaction([fastsm.value_is(claim, worker.encode())], [fastsm.touch(claim, expires)])


def job_key(queue: str, number: int) -> bytes:
    return f"queue/{queue}/job/{number:020}".encode()  # fixed width, so that keys sort as numbers do


def claim_key(queue: str, number: int) -> bytes:
    return f"queue/{queue}/claim/{number:020}".encode()


@fastsm.procedure(name="queue.push")
def push(tx: Any, payload: bytes) -> int:
    """Return the job's number: the index of its entry, so jobs are in the order of the log."""
    queue, _, job = payload.partition(b"/")
    tx.put(job_key(queue.decode(), tx.entry.index), job)
    number: int = tx.entry.index
    return number


@fastsm.procedure(name="queue.claim")
def claim(tx: Any, payload: bytes) -> list[Any]:
    """Return the number and the job; abort if none is free. O(claimed jobs), scanned in pages."""
    queue, worker, lease_ms, now = json.loads(payload)
    start = job_key(queue, 0)
    while page := tx.scan(start, prefix=f"queue/{queue}/job/".encode(), limit=100):
        for key, job in page:
            number = int(key[-20:])
            if tx.get(claim_key(queue, number)) is None:
                tx.put(claim_key(queue, number), worker.encode(), expires=max(now, tx.clock) + lease_ms)
                return [number, job]
        start = page[-1][0] + b"\0"
    raise fastsm.Abort


PROCEDURES = [push, claim]
