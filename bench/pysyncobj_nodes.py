"""The nodes of the compared clusters, stock PySyncObj's and fastsm's, as programs; and clusters of three of them.

Run as a script, with JSON options as its only argument, this is a node: it reads one call in JSON from each line and
answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pysyncobj.pickle
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.batteries import ReplDict

import fastsm
from fastsm.integrations.pysyncobj import DumpPolicy, ReplicatedStateMachine
from fastsm.integrations.pysyncobj.batteries import FastDict

BATCH = 100


# ---- a node, as a program --------------------------------------------------------------------------------


def keys_of(first: int, count: int) -> list[bytes]:
    return [b"key-%012d" % number for number in range(first, first + count)]


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """Return a process's resident, privately dirtied and anonymous memory, in bytes."""
    wanted = {"Rss": 0, "Private_Dirty": 0, "Anonymous": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in wanted:
                    wanted[name] = int(rest.split()[0]) << 10
    except OSError:
        pass
    return wanted


def waited_for_a_core() -> float:
    """Return the seconds that the calling thread has spent ready to run, but waiting for a core."""
    with open("/proc/thread-self/schedstat") as file:
        return int(file.read().split()[1]) / 1e9


class Node:
    """What all variants have in common: it times ticks (which has a cost) and counts how often it became leader."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.changes = 0
        self.conf = SyncObjConf(
            bindAddress=options["address"], appendEntriesUseBatch=False, connectionRetryTime=0.3,
            onStateChanged=self._changed,
        )  # fmt: skip
        self.make()
        self.gaps, self.last = (0.0, 0.0), (time.perf_counter(), 0.0)
        if options["watched"]:
            self.sync_obj.addOnTickCallback(self._tick)
        self.writing = False
        self.child_memory = 0

    def _changed(self, old: int, new: int) -> None:
        self.changes += new == 2

    def _tick(self) -> None:
        now = time.perf_counter(), waited_for_a_core()
        gap = now[0] - self.last[0]
        own = gap - (now[1] - self.last[1]) if self.last[1] else 0.0
        self.gaps, self.last = (max(self.gaps[0], gap), max(self.gaps[1], own)), now

    def call_take_gaps(self) -> tuple[float, float]:
        """Return the longest time from tick to tick, and the longest without the time spent waiting for a core."""
        gaps, self.gaps = self.gaps, (0.0, 0.0)
        return gaps

    def call_status(self) -> dict[str, Any]:
        leader = self.sync_obj._getLeader()
        return {"leader": leader.id if leader else None, "applied": self.sync_obj.raftLastApplied, "keys": self.count(),
                "changes": self.changes, "memory": memory_of()}

    def call_fill(self, first: int, count: int, window: int = 20) -> float:
        """Write keys with up to `window` commands in flight, and retry those that fail; return the seconds."""
        room = threading.Semaphore(window)
        starts = list(range(first, first + count, BATCH))
        began = time.perf_counter()
        while starts:
            failed: list[int] = []
            for start in starts:
                keys = keys_of(start, min(BATCH, first + count - start))
                values = [random.randbytes(100) for _ in keys]

                def answered(_: Any, reason: Any, start: int = start, failed: list[int] = failed) -> None:
                    if reason:
                        failed.append(start)
                    room.release()

                room.acquire()
                self.write(keys, values, answered)
            for _ in range(window):
                room.acquire()
            for _ in range(window):
                room.release()
            starts = failed
        return time.perf_counter() - began

    def call_measure(self, window: int, seconds: float, batch: int = 1) -> dict[str, float]:
        """Overwrite keys with `window` commands in flight; return commands per second and latencies in ms.

        With a window of 1 the thread waits for each command (`sync=True`), as most users of PySyncObj do.
        """
        took: list[float] = []
        keys = [keys_of(batch * number, batch) for number in range(1000)]
        values = [random.randbytes(100) for _ in range(batch)]
        stop = time.perf_counter() + seconds
        began = time.perf_counter()
        if window == 1:
            while (now := time.perf_counter()) < stop:
                self.write_and_wait(random.choice(keys), values)
                took.append(time.perf_counter() - now)
        else:
            self._measure_window(window, stop, keys, values, took)
        took.sort()
        return {"rate": len(took) / (time.perf_counter() - began), "p50": 1000 * took[len(took) // 2],
                "p99": 1000 * took[len(took) * 99 // 100]}

    def _measure_window(
        self, window: int, stop: float, keys: list[list[bytes]], values: list[bytes], took: list[float]
    ) -> None:
        room = threading.Semaphore(window)
        while time.perf_counter() < stop:
            room.acquire()

            def answered(_: Any, reason: Any, begun: float = time.perf_counter()) -> None:
                if not reason:
                    took.append(time.perf_counter() - begun)
                room.release()

            self.write(random.choice(keys), values, answered)
        for _ in range(window):
            room.acquire()

    def write_and_wait(self, keys: list[bytes], values: list[bytes]) -> None:
        """Write with one command and wait for it (`sync=True`)."""
        self.write(keys, values, None, sync=True, timeout=30)

    def call_begin_writes(self, first: int, count: int, rate: int) -> None:
        """Overwrite keys at a steady rate, one key per command, until `end_writes`."""
        self.writing = True

        def work() -> None:
            while self.writing:
                for _ in range(rate // 100):
                    key = keys_of(first + random.randrange(count), 1)
                    self.write(key, [random.randbytes(100)], None)
                time.sleep(0.01)

        self.writer = threading.Thread(target=work)
        self.writer.start()

    def call_end_writes(self) -> None:
        self.writing = False
        self.writer.join()

    def call_dump(self) -> float:
        """Start a dump and wait for it; return the seconds, and note the memory of its child process."""
        before = self.dumps()
        self.child_memory = 0
        began = time.perf_counter()
        self.sync_obj.forceLogCompaction()
        while self.dumps() == before:
            if self.options["variant"] == "stock":
                self._watch_child()
            time.sleep(0.002)
        return time.perf_counter() - began

    def _watch_child(self) -> None:
        try:
            children = Path(f"/proc/self/task/{self.sync_obj._SyncObj__thread.native_id}/children").read_text().split()
        except OSError:
            return
        for child in children:
            self.child_memory = max(self.child_memory, memory_of(child)["Private_Dirty"])

    def call_compact(self) -> float:
        """Compact the state machine's log; return the seconds, or 0 where there is no state machine."""
        return 0.0

    def call_child_memory(self) -> int:
        return self.child_memory


class Stock(Node):
    def make(self) -> None:
        self.dictionary = ReplDict()
        directory = Path(self.options["directory"])
        directory.mkdir(parents=True, exist_ok=True)
        self.conf.logCompactionMinEntries, self.conf.logCompactionMinTime = 10**9, 10**6
        self.conf.journalFile, self.conf.fullDumpFile = str(directory / "journal"), str(directory / "dump")
        if self.options["variant"] == "pickle5":
            setattr(pysyncobj.pickle, "__protocol", 4)
            self.conf.serializer, self.conf.deserializer = self.serialize, self.deserialize
        self.sync_obj = SyncObj(
            self.options["address"], self.options["partners"], self.conf, consumers=[self.dictionary])

    def serialize(self, name: str, data: Any) -> None:
        with open(name, "wb") as file:
            pickle.dump((self.dictionary._serialize(), data), file, 5)
            file.flush()
            os.fsync(file.fileno())

    def deserialize(self, name: str) -> Any:
        with open(name, "rb") as file:
            state, data = pickle.load(file)
        self.dictionary._deserialize(state)
        return data

    def call_protocol(self, version: int) -> None:
        setattr(pysyncobj.pickle, "__protocol", version)

    def write(self, keys: list[bytes], values: list[bytes], callback: Any, **options: Any) -> None:
        if len(keys) == 1:
            self.dictionary.set(keys[0], values[0], callback=callback, **options)
        else:
            self.dictionary.update(dict(zip(keys, values, strict=True)), callback=callback, **options)

    def count(self) -> int:
        return len(self.dictionary)

    def dumps(self) -> Any:
        return self.sync_obj._SyncObj__lastSerializedEntry


class Fast(Node):
    def make(self) -> None:
        self.put_many, self.put = fastsm.put_many, fastsm.put
        self.sync_obj = ReplicatedStateMachine(
            self.options["address"], self.options["partners"], self.options["directory"], conf=self.conf,
            durable=self.options["variant"] == "durable",
            policy=DumpPolicy(journal_bytes=1 << 40, trailing_entries=1000), consumers=self.consumers(),
        )  # fmt: skip

    def consumers(self) -> list[Any]:
        return []

    def write(self, keys: list[bytes], values: list[bytes], callback: Any, **options: Any) -> None:
        command = self.put(keys[0], values[0]) if len(keys) == 1 else self.put_many(keys, values)
        self.sync_obj.submit(command, callback=callback, **options)

    def count(self) -> int:
        return self.sync_obj.state_machine.len()

    def dumps(self) -> Any:
        return self.sync_obj.dumps

    def call_compact(self) -> float:
        began = time.perf_counter()
        self.sync_obj.state_machine.compact()
        return time.perf_counter() - began

    def call_protocol(self, version: int) -> None:
        pass


class Dictionary(Fast):
    def consumers(self) -> list[Any]:
        self.dictionary = FastDict(keys=bytes, values=bytes)
        return [self.dictionary]

    def write(self, keys: list[bytes], values: list[bytes], callback: Any, **options: Any) -> None:
        if len(keys) == 1:
            self.dictionary.set(keys[0], values[0], callback=callback, **options)
        else:
            self.dictionary.update(dict(zip(keys, values, strict=True)), callback=callback, **options)


KINDS = {"stock": Stock, "pickle5": Stock, "fastsm": Fast, "durable": Fast, "fastdict": Dictionary}


def serve(options: dict[str, Any]) -> None:
    began = time.perf_counter()
    node = KINDS[options["variant"]](options)
    for line in sys.stdin:
        arguments = json.loads(line)
        name = arguments.pop("call")
        if name == "wait_keys":
            while node.count() < arguments["count"] and time.perf_counter() - began < arguments["patience"]:
                time.sleep(0.002)
            answer: Any = time.perf_counter() - began if node.count() >= arguments["count"] else float("inf")
        else:
            answer = getattr(node, f"call_{name}")(**arguments)
        print(json.dumps(answer), flush=True)
    os._exit(0)


# ---- the cluster and what is measured ----------------------------------------------------------------------


class Cluster:
    def __init__(self, variant: str, root: Path, *, watched: bool = True) -> None:
        self.variant, self.root, self.watched = variant, root, watched
        sockets = [socket.socket() for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        self.addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        self.children: dict[int, subprocess.Popen[str]] = {}
        for number in range(3):
            self.start(number)

    def start(self, number: int) -> None:
        options = {
            "variant": self.variant, "watched": self.watched, "address": self.addresses[number],
            "directory": str(self.root / str(number)),
            "partners": [address for address in self.addresses if address != self.addresses[number]],
        }  # fmt: skip
        self.children[number] = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, stderr=(self.root / f"{number}.log").open("a"),
        )  # fmt: skip

    def send(self, number: int, name: str, **arguments: Any) -> None:
        stdin = self.children[number].stdin
        assert stdin is not None
        stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        stdin.flush()

    def receive(self, number: int) -> Any:
        stdout = self.children[number].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise RuntimeError((self.root / f"{number}.log").read_text()[-2000:])
        return json.loads(line)

    def call(self, number: int, name: str, **arguments: Any) -> Any:
        self.send(number, name, **arguments)
        return self.receive(number)

    def all(self, name: str, **arguments: Any) -> list[Any]:
        for number in self.children:
            self.send(number, name, **arguments)
        return [self.receive(number) for number in self.children]

    def leader(self) -> int:
        while True:
            leaders = {status["leader"] for status in self.all("status")}
            if len(leaders) == 1 and None not in leaders:
                return self.addresses.index(leaders.pop())
            time.sleep(0.05)

    def settle(self) -> None:
        while len({(status["applied"], status["keys"]) for status in self.all("status")}) > 1:
            time.sleep(0.05)

    def kill(self, number: int) -> None:
        child = self.children.pop(number)
        child.kill()
        child.wait()

    def close(self) -> None:
        for number in list(self.children):
            self.kill(number)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
