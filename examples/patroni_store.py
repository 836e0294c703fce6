"""The store that Patroni keeps in Raft, on fastsm: conditions on value, index and existence; deadlines; prefixes.

Run: ``python examples/patroni_store.py [seconds that a key lives]``. Needs ``fastsm[pysyncobj]``.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from pysyncobj import SyncObjConf

import fastsm
from fastsm.integrations.pysyncobj import Change, ReplicatedStateMachine, SubmitError

Record = dict[str, Any]
SESSION_MS = 24 * 60 * 60 * 1000


@fastsm.procedure(name="store.set")
def set_key(tx: Any, payload: bytes) -> int:
    """Set a key if it meets the requirements at this place in the log; return the entry's index."""
    key, value, required, ttl_ms, now = json.loads(payload)
    old, written = tx.get(key.encode()), tx.modified(key.encode())
    found = {
        "prevExist": old is not None, "prevValue": old and old.decode(), "prevIndex": written and written.index,
    }  # fmt: skip
    if any(found[name] != wanted for name, wanted in required.items()):
        raise fastsm.Abort
    tx.put(key.encode(), value.encode(), expires=None if ttl_ms is None else max(now, tx.clock) + ttl_ms)
    index: int = tx.entry.index
    return index


class Store:
    """Keys with a value, an index (the entry that wrote them) and perhaps a deadline, the same on every node.

    ``on_set(key, record)`` and ``on_delete(key)`` are called in the tick thread, on every node. Ticks, which the leader
    proposes, remove keys whose deadline has passed.
    """

    def __init__(
        self, own: str, partners: list[str], directory: str, *,
        on_set: Callable[[str, Record], object] = lambda key, record: None,
        on_delete: Callable[[str], object] = lambda key: None,
        patience: float = 10.0,
    ) -> None:
        self.on_set, self.on_delete, self.patience = on_set, on_delete, patience
        self._turn, self._session, self._sequence = threading.Lock(), 0, 0
        conf = SyncObjConf(bindAddress=own, appendEntriesUseBatch=False, dynamicMembershipChange=True)
        self.node = ReplicatedStateMachine(
            own, partners, directory, conf=conf, durable=True, procedures=[set_key], on_change=self._changed,
            clock=lambda machine: fastsm.Clock(machine, interval_ms=200))

    def get(self, key: str) -> Record | None:
        """Return the record of a key, as this node has it."""
        found = self.node.get_modified(key.encode())
        return None if found is None else {"value": found[0].decode(), "index": found[1].index}

    def get_all(self, prefix: str) -> dict[str, str]:
        """Return the values of all keys that start with a prefix, in order, as this node has them."""
        return {key.decode(): value.decode() for key, value in self.node.scan(prefix=prefix.encode()).entries}

    def set(
        self, key: str, value: str, ttl: float | None = None, *,
        prevExist: bool | None = None, prevValue: str | None = None, prevIndex: int | None = None,
    ) -> Record | None:
        """Set a key, for ``ttl`` seconds if given; return its record, or None if it does not meet the requirements."""
        conditions = {"prevExist": prevExist, "prevValue": prevValue, "prevIndex": prevIndex}
        required = {name: wanted for name, wanted in conditions.items() if wanted is not None}
        now, ttl_ms = time.time_ns() // 1_000_000, None if ttl is None else int(1000 * ttl)
        answer = self._do(fastsm.call("store.set", json.dumps([key, value, required, ttl_ms, now]).encode()))
        return {"value": value, "index": answer.value} if answer.ok else None

    def delete(self, key: str, *, prevValue: str | None = None, prevIndex: int | None = None) -> bool:
        """Delete a key if it exists and meets the requirements when the command is applied; return whether it did."""
        name = key.encode()
        conditions = [fastsm.exists(name)]
        if prevValue is not None:
            conditions.append(fastsm.value_is(name, prevValue.encode()))
        if prevIndex is not None:
            conditions.append(fastsm.modified_at(name, prevIndex))
        return bool(self._do(fastsm.transaction(conditions, [fastsm.delete(name)])))

    def delete_all(self, prefix: str) -> int:
        """Delete all keys that start with a prefix, in one step; return how many there were."""
        count: int = self._do(fastsm.delete_prefix(prefix.encode())).value
        return count

    def _do(self, command: bytes) -> fastsm.Answer:
        """Have a command applied once: it is submitted again for as long as its outcome is unknown."""
        give_up = time.monotonic() + self.patience
        with self._turn:
            self._sequence += 1
            while True:
                expires = time.time_ns() // 1_000_000 + SESSION_MS
                try:
                    if not self._session:
                        opened = self.node.open_session(expires=expires, sync=True, timeout=2)
                        assert isinstance(opened, fastsm.Answer)
                        self._session = opened.value
                    answer = self.node.once(
                        self._session, self._sequence, command, expires=expires, sync=True, timeout=2)
                    assert isinstance(answer, fastsm.Answer)
                except SubmitError:
                    if time.monotonic() > give_up:
                        raise
                    continue
                if answer.reason != "no session":  # a session ends if it is not used for a day
                    return answer
                self._session = 0

    def _changed(self, changes: list[Change] | None) -> None:
        if changes is None:  # a snapshot of the leader was installed: every key may have changed
            for key in self.get_all(""):
                self.on_set(key, self.get(key) or {})
        for change in changes or ():
            if change.value is None:
                self.on_delete(change.key.decode())
            else:
                self.on_set(change.key.decode(), {"value": change.value.decode(), "index": change.index})


def main(seconds: float) -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    gone = threading.Event()
    with tempfile.TemporaryDirectory() as root:
        stores = [
            Store(own, [other for other in addresses if other != own], f"{root}/{number}",
                  on_delete=lambda key: gone.set() if key == "/leader" else None)
            for number, own in enumerate(addresses)
        ]  # fmt: skip
        while not all(store.node.isReady() for store in stores):
            time.sleep(0.05)
        won = [store.set("/leader", f"node {n}", ttl=seconds, prevExist=False) for n, store in enumerate(stores)]
        print("who took the leader's key:", [record["value"] for record in won if record])
        for number, store in enumerate(stores):
            store.set(f"/members/{number}", addresses[number])
        first = stores[0].set("/config", "1")
        assert first is not None
        second = stores[1].set("/config", "2", prevIndex=first["index"])
        print("a second one by index:", bool(second), "- a third one by the same:",
              bool(stores[1].set("/config", "3", prevIndex=first["index"])))
        leads = next(store for store in stores if store.node._isLeader())
        leads.node.destroy_synchronous()  # the next leader's ticks remove the key when its time is over
        rest = [store for store in stores if store is not leads]
        gone.wait(30)
        print("taken again:", bool(rest[0].set("/leader", "another", prevExist=False)))
        print("members removed:", rest[1].delete_all("/members/"))
        rest[0].node.sync_read(b"")
        print("what is left:", rest[0].get_all("/"))
        for store in rest:
            store.node.destroy_synchronous()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
