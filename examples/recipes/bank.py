"""A transfer between two accounts: both sides or neither, never below zero, and never twice.

>>> machine = fastsm.MemoryStateMachine(procedures=[transfer])
>>> def propose(command):
...     return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]
>>> propose(fastsm.put_many([b"account/ann", b"account/bob"], [b"100", b"0"]))
True
>>> propose(transfer_command("ann", "bob", 70))
Answer(ok=True, value=[30, 70], reason=None)
>>> propose(transfer_command("ann", "bob", 70))
Answer(ok=False, value=b'ann has 30, not 70', reason='abort')

A client that repeats a request does so in its session, so that the money moves once:

>>> session = propose(fastsm.open_session()).value
>>> for _ in range(2):
...     propose(fastsm.once(session, 1, transfer_command("bob", "ann", 20)))
Answer(ok=True, value=[50, 50], reason=None)
Answer(ok=True, value=[50, 50], reason=None)
"""

from __future__ import annotations

import json
from typing import Any

import fastsm


def transfer_command(source: str, target: str, amount: int) -> bytes:
    """Return the command that moves an amount from one account to another."""
    if amount <= 0:
        raise ValueError(f"amount {amount}: expected 1 or more")
    return fastsm.call("bank.transfer", json.dumps([source, target, amount]).encode())


@fastsm.procedure(name="bank.transfer")
def transfer(tx: Any, payload: bytes) -> list[int]:
    """Return both balances after the transfer; abort, which undoes everything, if the balance is too small.

    A client may propose any payload, so the checks of ``transfer_command`` are repeated here.
    """
    source, target, amount = json.loads(payload)
    if amount < 1:
        raise fastsm.Abort(b"an amount is 1 or more")
    left = tx.add(b"account/" + source.encode(), -amount)
    if left < 0:
        raise fastsm.Abort(f"{source} has {left + amount}, not {amount}".encode())
    return [left, tx.add(b"account/" + target.encode(), amount)]
