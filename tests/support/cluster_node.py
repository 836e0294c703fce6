"""One node of a cluster under test, as a program. `cluster.py` sends it calls as lines of JSON.

Options: `address`, `partners`, `directory`, `durable`; `policy` of dumps; `listed` ("list": a `ReplList` next to the
state machine; "queue": a `FastQueue` in it); `crash` ("Class.method:before" or ":after": the process is killed there);
`failing` ("part.method:errno": that method of the seam to the system fails); `slow` (seconds that each chunk takes);
`acknowledged` (the file that records acknowledged writes); `members` (they may change); `raising` (the user's functions
raise again and again); `clock` (its rate, and the seconds by which it is ahead).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import queue
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

import pysyncobj.monotonic
from pysyncobj import FAIL_REASON, SyncObjConf
from pysyncobj.batteries import ReplList
from recipes import recipe

import fastsm
from fastsm.disk.files import Directory
from fastsm.integrations.pysyncobj import DumpPolicy, FastJournal, ReplicatedStateMachine, SubmitError
from fastsm.integrations.pysyncobj.batteries import FastQueue
from fastsm.integrations.pysyncobj.places import Places

CLASSES = {
    "FastJournal": FastJournal, "FastStateMachine": fastsm.FastStateMachine, "Places": Places,
    "SnapshotReceiver": fastsm.SnapshotReceiver, "Node": ReplicatedStateMachine,
}  # fmt: skip


def crash_at(place: str) -> None:
    """Kill the process when it reaches a method, or the method's end."""
    name, _, when = place.partition(":")
    owner, method = name.split(".")
    original = getattr(CLASSES[owner], method)

    def crashing(self: Any, *arguments: Any, **options: Any) -> Any:
        if when == "after":
            original(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(CLASSES[owner], method, crashing)


def failing_files(place: str) -> Any:
    """Return a seam to the system in which a method fails after `Node.call_fail` was called."""
    name, _, code = place.partition(":")
    part, method = name.split(".")
    original = getattr(Directory, method)
    static = isinstance(Directory.__dict__[method], staticmethod)

    def failing(self: Any, *arguments: Any) -> Any:
        if Node.failing:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return original(*arguments) if static else original(self, *arguments)

    broken = type("FailingDirectory", (Directory,), {method: failing})
    return lambda of: broken if of == part else Directory


class Queue(FastQueue):
    """A queue with the method names of a list."""

    def append(self, item: str, **options: Any) -> Any:
        return self.put(item, **options)

    def rawData(self) -> list[str]:
        return [self._items.decode(value) for key, value in self._pairs() if key]


def set_clock(rate: float, ahead: float) -> None:
    """Let this process's clocks, including PySyncObj's, run at another rate and from another time."""
    exact = time.time_ns
    begun = exact()
    time.time_ns = lambda: begun + int(ahead * 1e9) + int(rate * (exact() - begun))
    for module, name in [(time, "time"), (pysyncobj.monotonic, "monotonic")]:
        original = getattr(module, name)
        begin = original()

        def clock(original: Any = original, begin: float = begin) -> float:
            return begin + ahead + rate * (original() - begin)

        setattr(module, name, clock)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("pysyncobj.") and hasattr(module, "monotonicTime"):
            module.monotonicTime = pysyncobj.monotonic.monotonic


@fastsm.procedure
def deposit(tx: Any, payload: bytes) -> list[int]:
    """Add one to the total and to an account."""
    return [tx.add(b"once-total", 1), tx.add(payload, 1)]


def deposit_command(account: bytes, sequence: int) -> bytes:
    """Return a deposit as a batch, a transaction or a procedure, in turns; its answer's value is [total, account]."""
    adds = [fastsm.add(b"once-total", 1), fastsm.add(account, 1)]
    return (fastsm.batch(adds), fastsm.transaction([], adds), fastsm.call("deposit", account))[sequence % 3]


def raising(*_: Any) -> None:
    """Raise now and then, as a user's function might."""
    if random.random() < 0.02:
        raise ValueError("the user's own error")


class Node:
    """The node, with a method for each call."""

    failing = False

    def __init__(self, options: dict[str, Any]) -> None:
        self.acknowledged = os.open(options["acknowledged"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        kind = {"list": ReplList, "queue": Queue}.get(options.get("listed"))  # type: ignore[arg-type]
        self.list: Any = None if kind is None else kind()
        more: dict[str, Any] = {}
        if "failing" in options:
            more["_files"] = failing_files(options["failing"])
        conf = SyncObjConf(
            appendEntriesUseBatch=False, bindAddress=options["address"], connectionRetryTime=0.1,
            raftMinTimeout=0.7, raftMaxTimeout=1.5, autoTickPeriod=0.02,
            dynamicMembershipChange=options.get("members", False),
        )  # fmt: skip
        self.after_answer = raising if options.get("raising") else lambda: None
        if options.get("raising"):
            conf.onReady = conf.onStateChanged = conf.onCodeVersionChanged = [].pop  # raises each time
            more["on_change"] = raising
        if "clock" in options:
            set_clock(*options["clock"])
        self.node = ReplicatedStateMachine(
            options["address"], options["partners"], options["directory"], conf=conf,
            durable=options.get("durable", False), consumers=[self.list] if self.list is not None else [],
            policy=DumpPolicy(**options.get("policy", {})), procedures=[deposit, *recipe("lock").PROCEDURES], **more,
        )  # fmt: skip
        if options.get("raising"):
            self.node.addOnTickCallback(raising)
        if "slow" in options:
            machine_apply = self.node._fastsm_apply_chunk

            def slow(entries: Any) -> Any:
                time.sleep(options["slow"])
                return machine_apply(entries)

            self.node._fastsm_apply_chunk = slow
        self.loading = False
        self.load_thread: threading.Thread | None = None

    def call_status(self) -> dict[str, Any]:
        node = self.node
        leader = node._getLeader()
        if node.failure is not None:
            return {"leader": None, "failure": repr(node.failure), "applied": None, "last_index": None}
        return {
            "leader": None if leader is None else leader.id,
            "applied": node.state_machine.last_applied(), "last_index": node.journal.last_index,
            "first_index": node.journal.first_index, "dumps": node.dumps, "installs": node.installs,
            "members": sorted(each.id for each in node.otherNodes),
            "failure": None, "refused": node.refused, "term": node.raftCurrentTerm,
        }  # fmt: skip

    def persist(self, command: bytes) -> Any:
        """Submit an idempotent command until it is applied: the leader may change at any time."""
        stop = time.monotonic() + 30
        while True:
            try:
                return self.node.submit(command, sync=True, timeout=10)
            except SubmitError:
                if time.monotonic() > stop:
                    raise

    def call_put(self, key: str, value: str) -> Any:
        return self.persist(fastsm.put(key.encode(), value.encode()))

    def call_swap(self, key: str, expected: str | None, value: str | None) -> Any:
        expected_bytes = None if expected is None else expected.encode()
        return self.node.compare_and_swap(key.encode(), expected_bytes, (value or "").encode(), sync=True, timeout=20)

    def call_read(self, key: str) -> Any:
        value = self.node.sync_read(key.encode(), timeout=20)
        return None if value is None else value.decode()

    def call_large(self, key: str, size: int) -> Any:
        return self.persist(fastsm.put(key.encode(), os.urandom(size)))

    def call_submit_raw(self, command: str) -> Any:
        """Submit a command that `submit` would refuse, as a node of another release might do."""
        outcome: list[Any] = []
        self.node._applyCommand(bytes.fromhex(command), lambda *answer: outcome.append(answer), 0x46)
        stop = time.monotonic() + 10
        while not outcome and time.monotonic() < stop and self.node.failure is None:
            time.sleep(0.01)
        return outcome[0] if outcome else None

    def call_submit(self, command: str, timeout: float) -> str:
        """Submit a command; return its result, pickled."""
        return pickle.dumps(self.node.submit(bytes.fromhex(command), sync=True, timeout=timeout)).hex()

    def call_changes(self, start: int) -> str | None:
        """Return the last applied entry and all changes from an entry on, pickled; None if some are compacted."""
        machine = self.node.state_machine
        applied, found = machine.last_applied().index, []
        try:
            with machine.watch(start=start) as watch:
                while changes := watch.read(timeout=0):
                    found += changes
        except fastsm.CompactedError:
            return None
        return pickle.dumps((applied, found)).hex()

    def call_append(self, item: str) -> Any:
        assert self.list is not None
        return self.list.append(item, sync=True, timeout=20)

    def call_open_sessions(self, count: int) -> list[int]:
        return [self.persist(fastsm.open_session()).value for _ in range(count)]

    def call_deposit(self, items: list[tuple[int, int, str]], timeout: float) -> list[Any]:
        """Make a deposit for each session, sequence and account, all together; return answers, None if unknown."""
        told: queue.Queue[tuple[int, Any]] = queue.Queue()
        for number, (session, sequence, account) in enumerate(items):

            def answered(result: Any, reason: Any, number: int = number) -> None:
                told.put((number, result if reason == FAIL_REASON.SUCCESS else None))

            command = deposit_command(account.encode(), sequence)
            self.node.once(session, sequence, command, callback=answered, timeout=timeout)
        found = dict(told.get(timeout=timeout + 20) for _ in items)
        return [found[number] for number in range(len(items))]

    def call_value(self, key: str) -> int:
        return int(self.node.get(key.encode()) or 0)

    def _write_and_remove(self, prefix: str) -> None:
        """Write three keys, then remove them together; record it when the removal is acknowledged."""
        keys = [f"{prefix}{number}".encode() for number in range(3)]

        def written(result: Any, reason: Any) -> None:
            if reason == FAIL_REASON.SUCCESS:
                remove = fastsm.delete_prefix(prefix.encode())
                self.node.submit(remove, callback=removed, timeout=5)

        def removed(answer: Any, reason: Any) -> None:
            if reason == FAIL_REASON.SUCCESS:
                word = "gone" if answer == (True, 3, None) else "WRONG"
                os.write(self.acknowledged, f"{word} {prefix}\n".encode())

        self.node.submit(fastsm.put_many(keys, [b""] * 3), callback=written, timeout=5)

    def call_fill(self, prefix: str, count: int, size: int, batch: int = 500) -> None:
        """Write `count` keys in batches; return when all are applied on this node."""
        for start in range(0, count, batch):
            keys = [b"%s-%d" % (prefix.encode(), n) for n in range(start, min(count, start + batch))]
            command = fastsm.put_many(keys, [os.urandom(size) for _ in keys])
            self.persist(command)

    def call_load(self, prefix: str, window: int = 100, size: int = 50, listed: bool = False) -> None:
        """Write new keys, `window` at a time, until `unload`; record each acknowledged one in the file."""
        self.loading = True
        room = threading.Semaphore(window)

        def work() -> None:
            number = 0
            while self.loading:
                number += 1
                key = f"{prefix}-{number}"
                if not room.acquire(timeout=10):
                    room.release()

                def answered(result: Any, reason: Any, key: str = key) -> None:
                    if reason == FAIL_REASON.SUCCESS:
                        word = "ok" if listed or result is True else "WRONG"
                        os.write(self.acknowledged, f"{word} {key}\n".encode())
                    room.release()
                    self.after_answer()

                try:
                    if listed:
                        assert self.list is not None
                        self.node.put(key.encode(), b"", timeout=5)
                        self.list.append(key, callback=answered)
                    else:
                        value = os.urandom(size)
                        self.node.compare_and_swap(key.encode(), None, value, callback=answered, timeout=5)
                        if number % 10 == 5:
                            expires = time.time_ns() // 10**6 + random.randrange(3000)
                            self.node.put(f"lease-{key}".encode(), b"", expires=expires, timeout=5)
                        if number % 10 == 0:
                            self._write_and_remove(f"gone-{key}-")
                except fastsm.NotRunningError:
                    return

        self.load_thread = threading.Thread(target=work, daemon=True)
        self.load_thread.start()

    def call_unload(self) -> None:
        self.loading = False
        if self.load_thread is not None:
            self.load_thread.join(15)

    def call_compact(self) -> None:
        self.node.forceLogCompaction()

    def call_transfer(self) -> None:
        self.node.transferLeadership()

    def call_change_members(self, what: str, address: str) -> Any:
        """Add or remove a member; return the reason that the callback was given."""
        told: queue.Queue[Any] = queue.Queue()
        change = self.node.addNodeToCluster if what == "add" else self.node.removeNodeFromCluster
        change(address, callback=lambda _, reason: told.put(reason))
        try:
            return told.get(timeout=5)
        except queue.Empty:
            return None

    def call_fail(self) -> None:
        Node.failing = True

    def call_contents(self) -> dict[str, Any]:
        machine = self.node.state_machine
        machine._check()
        while True:
            entries, revision = machine.scan()
            listed = None if self.list is None else list(self.list.rawData())
            with tempfile.TemporaryDirectory() as directory:
                applied = machine.write_snapshot(directory).last_included
                with fastsm.open_snapshot(directory) as snapshot:
                    checksum = snapshot.state_checksum.hex()
            if applied.index == revision:  # otherwise one of the leader's ticks came in between
                break
        keys = [key.decode() for key, _ in entries if not key.startswith(b"queue\0")]
        return {"applied": applied, "keys": keys, "checksum": checksum, "listed": listed}

    def call_destroy(self) -> None:
        self.node.destroy_synchronous()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(levelname)s %(message)s")
    options = json.loads(sys.argv[1])
    if "crash" in options:
        crash_at(options["crash"])
    node = Node(options)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"value": getattr(node, f"call_{arguments.pop('call')}")(**arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    node.call_unload()
    node.node.destroy_synchronous()


if __name__ == "__main__":
    main()
