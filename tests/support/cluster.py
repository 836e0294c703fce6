"""A cluster of real processes on the loopback interface; any of them may be killed at any moment.

A node is `cluster_node.py`, run as a program: it reads a line of JSON for each call and answers with one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parent / "cluster_node.py"
PATIENCE = 40.0


class NodeError(AssertionError):
    """A call raised in the node; the message is its traceback."""


class Process:
    """One running node."""

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        self._log = log.open("ab")
        self._child = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._lock = threading.Lock()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def call(self, name: str, **arguments: Any) -> Any:
        assert self._child.stdin is not None
        request = json.dumps({"call": name, **arguments}).encode() + b"\n"
        with self._lock:
            try:
                self._child.stdin.write(request)
                self._child.stdin.flush()
            except (OSError, ValueError):  # a ValueError once `end` has closed the pipe
                raise NodeError("the node has ended") from None
            try:
                answer = self._answers.get(timeout=PATIENCE)
            except queue.Empty:
                raise NodeError(f"no answer to {name}") from None
        if answer is None:
            self._answers.put(None)  # for the next thread that asks
            raise NodeError("the node has ended")
        if "error" in answer:
            raise NodeError(answer["error"])
        return answer["value"]

    def end(self, *, kill: bool) -> int:
        if kill:
            self._child.kill()
        elif self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()
        code = self._child.wait(PATIENCE)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()
        return code

    def wait(self) -> int:
        """Wait until the process ends by itself; return its exit code."""
        code = self._child.wait(PATIENCE)
        self.end(kill=True)
        return code


class Cluster:
    """Nodes 0 to ``size - 1``; every node gets the ``options``, see `cluster_node.py`."""

    def __init__(self, root: Path, size: int = 3, **options: Any) -> None:
        self.root = root
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(size)]
        self.options = options
        self.processes: dict[int, Process] = {}
        self.kills = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.end(kill=True)
        self.processes.clear()

    def directory(self, number: int) -> Path:
        return self.root / f"node-{number}"

    def start(self, *numbers: int, **options: Any) -> None:
        """Start nodes: all of them if none is named."""
        for number in numbers or range(len(self.addresses)):
            assert number not in self.processes
            partners = [address for other, address in enumerate(self.addresses) if other != number]
            self.processes[number] = Process(
                {
                    "address": self.addresses[number], "partners": partners, "directory": str(self.directory(number)),
                    "acknowledged": str(self.root / "acknowledged"), **self.clock_of(number), **self.options, **options,
                },
                self.root / f"node-{number}.log",
            )  # fmt: skip

    def clock_of(self, number: int) -> dict[str, Any]:
        """Return the rate and the offset of a node's clocks, if the option `apart` is set."""
        return {"clock": ((1.0, 0.0), (1.15, 5e3), (0.87, -9e3))[number % 3]} if self.options.get("apart") else {}

    def kill(self, *numbers: int) -> None:
        """Kill nodes with SIGKILL: all of them if none is named."""
        for number in numbers or tuple(self.processes):
            self.kills += 1
            assert self.processes.pop(number).end(kill=True) == -9

    def stop(self, *numbers: int) -> None:
        """End nodes cleanly: all of them if none is named."""
        for number in numbers or tuple(self.processes):
            self.processes.pop(number).end(kill=False)

    def pause(self, *numbers: int) -> None:
        """Pause nodes, as happens to a virtual machine that is migrated."""
        for number in numbers:
            os.kill(self.processes[number].pid, signal.SIGSTOP)

    def resume(self, *numbers: int) -> None:
        for number in numbers:
            os.kill(self.processes[number].pid, signal.SIGCONT)

    def change_members(self, what: str, number: int) -> None:
        """Let the leader add or remove a node; return when all other running nodes know of it."""
        address = self.addresses[number]
        others = [other for other in self.processes if other != number]

        def changed() -> bool | None:
            try:
                known = [address in self.call(other, "status")["members"] for other in others]
                if all(each == (what == "add") for each in known):
                    return True
                leader = self.leader_among(others)
                if leader is not None:
                    self.call(leader, "change_members", what=what, address=address)
            except NodeError:
                pass
            return None

        wait_for(changed, f"{what} {number}", lambda: [self.call(other, "status") for other in others])

    def leader_among(self, numbers: list[int]) -> int | None:
        """Return the one of these nodes that they all follow, or None."""
        told = {self.call(number, "status")["leader"] for number in numbers}
        leaders = [number for number in numbers if told == {self.addresses[number]}]
        return leaders[0] if leaders else None

    def call(self, number: int, name: str, **arguments: Any) -> Any:
        return self.processes[number].call(name, **arguments)

    def leader(self) -> int:
        """Wait until all running nodes agree on a running leader; return its number."""

        def agreed() -> int | None:
            alive = [number for number, process in self.processes.items() if process.alive]
            try:
                told = {self.call(number, "status")["leader"] for number in alive}
            except NodeError:
                return None  # a node was about to end by itself
            if len(told) == 1 and (address := told.pop()) is not None:
                number = self.addresses.index(address)
                return number if number in alive else None
            return None

        return wait_for(agreed, "a leader")

    def wait_ready(self) -> int:
        """Wait until every running node has caught up; return the leader."""
        leader = self.leader()
        self.call(leader, "put", key="ready", value=str(time.time()))
        self.wait_equal()
        return leader

    def wait_equal(self) -> int:
        """Wait until all running nodes have applied the same entries; return the last one's index."""

        def equal() -> int | None:
            told = [self.call(number, "status") for number in self.processes]
            applied = {tuple(status["applied"]) for status in told}
            ends = {status["last_index"] for status in told}
            return applied.pop()[0] if len(applied) == 1 and ends == {next(iter(applied))[0]} else None

        def settled() -> int | None:
            first = equal()
            return first if first is not None and equal() == first else None

        return wait_for(settled, "equal nodes", lambda: [self.call(n, "status") for n in self.processes])

    def acknowledged(self) -> list[str]:
        """Return the keys whose writes were acknowledged, to any client, before or after any kill."""
        return self._noted("ok")

    def _noted(self, word: str) -> list[str]:
        """Return what the nodes have written to their common file under a word."""
        path = self.root / "acknowledged"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]  # a kill may have cut the last one
        wrong = [line for line in lines if not line.startswith(("ok ", "gone "))]
        assert not wrong, f"a write of a new key was refused, or keys of a prefix were missing: {wrong[:3]}"
        return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]

    def check(self) -> int:
        """Check equal contents and state checksums, and each acknowledged write exactly once: the end of every test.

        Return how many writes were acknowledged.
        """

        def at_one_entry() -> list[Any] | None:
            self.leader()
            self.wait_equal()
            found = [self.call(number, "contents") for number in self.processes]
            # A new leader's first entry may come between two of the calls.
            return found if all(contents["applied"] == found[0]["applied"] for contents in found) else None

        found: list[Any] = wait_for(at_one_entry, "contents as of one entry")
        assert all(contents == found[0] for contents in found), [{**f, "keys": len(f["keys"])} for f in found]
        acknowledged = self.acknowledged()
        assert len(set(acknowledged)) == len(acknowledged)
        lost = set(acknowledged) - set(found[0]["keys"])
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged writes are lost, {sorted(lost)[:3]}"
        gone = set(self._noted("gone"))
        back = [key for key in found[0]["keys"] if key.startswith("gone-") and key[:-1] in gone]
        assert not back, f"{len(back)} removed keys are back, {back[:3]}"
        listed = found[0]["listed"]
        if listed is not None:
            assert len(set(listed)) == len(listed), "an entry was applied twice"
            missing = {key for key in acknowledged if key.startswith("list")} - set(listed)
            assert not missing, f"{len(missing)} acknowledged entries of the list are lost"
        return len(acknowledged)


def wait_for(condition: Callable[[], Any], what: str, why: Callable[[], Any] | None = None) -> Any:
    """Wait until a condition's value is not None; return the value."""
    stop = time.monotonic() + PATIENCE
    error: BaseException | None = None
    while time.monotonic() < stop:
        value = condition()
        if value is not None:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited for {what} in vain: {why() if why else ''} {error or ''}")


_held: list[socket.socket] = []


def release_ports() -> None:
    """Release the ports that `free_ports` has found so far."""
    while _held:
        _held.pop().close()


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface for this process alone, below the system's ephemeral ports.

    On Linux each port stays bound, so that no other process gets it, not even while the node that uses it is dead.
    PySyncObj's server can still bind it, because both set SO_REUSEADDR and only one of them listens.
    """
    found: list[int] = []
    rng = random.SystemRandom()
    while len(found) < count:
        port = rng.randrange(20000, 32000)
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            probe.close()
            continue
        if sys.platform == "linux":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not earlier: no port in use
            _held.append(probe)
        else:
            probe.close()
        if port not in found:
            found.append(port)
    return found


@contextlib.contextmanager
def running(root: Path, size: int = 3, *, of: type[Cluster] = Cluster, **options: Any) -> Iterator[Cluster]:
    """Run a cluster for a block; print the nodes' logs if something fails."""
    with of(root, size, **options) as cluster:
        cluster.start()
        try:
            cluster.wait_ready()
            yield cluster
        except BaseException:
            for number in range(size):
                log = root / f"node-{number}.log"
                if log.exists():
                    print(f"---- node {number}\n{log.read_text()[-3000:]}")
            raise


def remove_node(cluster: Cluster, number: int) -> None:
    """Remove a node's directory, as an operator would."""
    shutil.rmtree(cluster.directory(number))
