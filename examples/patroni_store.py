"""The store that Patroni keeps in Raft, on fastsm: comparing by value, index and existence, deadlines, prefixes.

Run: ``python examples/patroni_store.py [seconds that a key lives]``. Needs ``fastsm[pysyncobj]``.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from pysyncobj import FAIL_REASON, SyncObjConf

import fastsm
from fastsm.integrations.pysyncobj import Change, ReplicatedStateMachine

Record = dict[str, Any]


class Store:
    """Values with an index (the entry that wrote them) and perhaps a deadline, the same on every node.

    ``on_set(key, record)`` and ``on_delete(key)`` are called in the tick thread, on every node.
    """

    def __init__(
        self, own: str, partners: list[str], directory: str, *,
        on_set: Callable[[str, Record], object] = lambda key, record: None,
        on_delete: Callable[[str], object] = lambda key: None,
    ) -> None:
        self.on_set, self.on_delete = on_set, on_delete
        self.expiring: dict[bytes, bytes] = {}
        conf = SyncObjConf(bindAddress=own, appendEntriesUseBatch=False, dynamicMembershipChange=True)
        self.node = ReplicatedStateMachine(
            own, partners, directory, conf=conf, durable=True, on_change=self._changed)
        self.node.addOnTickCallback(self._expire)

    def get(self, key: str) -> Record | None:
        """The record of a key, as this node has it."""
        return self._read(key)[1] or None

    def _read(self, key: str) -> tuple[bytes | None, Record]:
        """What a comparison needs, of one state: the bytes and what they say."""
        found = self.node.get_modified(key.encode())
        return (None, {}) if found is None else (found[0], {**json.loads(found[0]), "index": found[1].index})

    def get_all(self, prefix: str) -> dict[str, Any]:
        """The values of all keys below a prefix."""
        found = self.node.scan_prefix(prefix.encode()).entries
        return {key.decode(): json.loads(value)["value"] for key, value in found}

    def set(self, key: str, value: str, ttl: float | None = None, **required: Any) -> Record | None:
        """Sets a key if what is required (prevExist, prevValue, prevIndex) holds when it is its turn; else None."""
        name = os.urandom(8).hex()  # no two records are equal, so comparing their bytes compares their index
        while True:
            before, old = self._read(key)
            if old.get("id") == name:
                return old  # an attempt whose answer was lost
            if not self._holds(old, **required):
                return None
            now = time.time()
            record = {"value": value, "created": old.get("created", now), "updated": now, "id": name}
            if ttl is not None:
                record["expire"] = now + ttl
            index = self._submit(fastsm.compare_and_swap(key.encode(), before, json.dumps(record).encode()))
            if index is not None:
                return {**record, "index": index}

    def delete(self, key: str, **required: Any) -> bool:
        """Deletes a key if what is required holds when it is its turn."""
        while True:
            before, old = self._read(key)
            if before is None or not self._holds(old, **required):
                return False
            if self._submit(fastsm.compare_and_swap(key.encode(), before, None)) is not None:
                return True

    def delete_all(self, prefix: str) -> None:
        """Deletes all keys below a prefix that this node knows of, in one step."""
        keys = [key for key, _ in self.node.scan_prefix(prefix.encode()).entries]
        if keys:
            self._submit(fastsm.batch([fastsm.delete(key) for key in keys]))

    @staticmethod
    def _holds(
        old: Record, prevExist: bool | None = None, prevValue: str | None = None, prevIndex: int | None = None
    ) -> bool:
        return (
            (prevExist is None or prevExist == bool(old))
            and (prevValue is None or old.get("value") == prevValue)
            and (prevIndex is None or old.get("index") == prevIndex)
        )

    def _submit(self, command: bytes) -> int | None:
        """Has it applied; the index of its entry, or None where it did not match, or nobody knows: look again."""
        told: queue.Queue[Any] = queue.Queue()
        self.node.submit(
            command, timeout=5,
            callback=lambda result, reason: told.put((result, reason, self.node.raftLastApplied + 1)))
        result, reason, index = told.get()
        return index if reason == FAIL_REASON.SUCCESS and result else None

    def _expire(self) -> None:
        """In each tick: the leader removes what is over, if it is still the same when its turn comes."""
        if not self.node._isLeader():
            self.expiring.clear()
            return
        for key, data in self.node.scan_prefix(b"").entries:
            if json.loads(data).get("expire", time.time() + 1) <= time.time() and self.expiring.get(key) != data:
                self.expiring[key] = data
                self.node.compare_and_swap(key, data, None)

    def _changed(self, changes: list[Change] | None) -> None:
        for change in changes or ():  # None: a snapshot came; a real one would read everything again
            if change.value is None:
                self.on_delete(change.key.decode())
            else:
                self.on_set(change.key.decode(), {**json.loads(change.value), "index": change.index})


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
        while stores[1].get("/config") != first:  # what is required is looked at here first, as in Patroni
            time.sleep(0.01)
        second = stores[1].set("/config", "2", prevIndex=first["index"])
        print("a second one by index:", bool(second), "- a third one by the same:",
              bool(stores[1].set("/config", "3", prevIndex=first["index"])))
        leads = next(store for store in stores if store.node._isLeader())
        leads.node.destroy_synchronous()  # its successor removes the key in its time
        rest = [store for store in stores if store is not leads]
        gone.wait(30)
        while any(store.get("/leader") for store in rest):
            time.sleep(0.05)
        print("taken again:", bool(rest[0].set("/leader", "another", prevExist=False)))
        rest[1].delete_all("/members/")
        while rest[0].get_all("/members/"):
            time.sleep(0.05)
        print("what is left:", rest[0].get_all("/"))
        for store in rest:
            store.node.destroy_synchronous()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
