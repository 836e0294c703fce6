"""A cluster of three nodes in three processes; one is killed and restarted. Needs ``fastsm[pysyncobj]``.

Run: ``python examples/pysyncobj_cluster.py [seconds of load in each act]``
"""

from __future__ import annotations

import functools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pysyncobj import FAIL_REASON, SyncObjConf

from fastsm.integrations.pysyncobj import DumpPolicy, ReplicatedStateMachine

POLICY = DumpPolicy(journal_bytes=1 << 20, ratio=0, least_seconds=0.5, trailing_entries=100)


# ---- a node: this file, run as a program ------------------------------------------------------------------


class Writer:
    """Keeps 50 writes in flight, and remembers which were acknowledged."""

    def __init__(self, node: ReplicatedStateMachine, name: str) -> None:
        self.node, self.name = node, name
        self.acknowledged: list[bytes] = []
        self.running = True
        self.room = threading.Semaphore(50)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        number = 0
        while self.running:
            if self.room.acquire(timeout=0.1):
                number += 1
                key = f"{self.name}-{number}".encode()
                self.node.put(key, bytes(100), callback=functools.partial(self.answered, key), timeout=5)

    def answered(self, key: bytes, result: Any, reason: Any) -> None:
        if reason == FAIL_REASON.SUCCESS:
            self.acknowledged.append(key)
        self.room.release()

    def end(self) -> list[bytes]:
        self.running = False
        self.thread.join()
        return self.acknowledged


def serve(own: str, partners: list[str], directory: str) -> None:
    """Run a node that answers each line of its standard input with a line of JSON."""
    conf = SyncObjConf(appendEntriesUseBatch=False, bindAddress=own, connectionRetryTime=0.2)
    node = ReplicatedStateMachine(own, partners, directory, conf=conf, durable=True, policy=POLICY)
    writer = None
    acknowledged: list[bytes] = []
    for line in sys.stdin:
        what, *rest = line.split()
        answer: Any = None
        if what == "write":
            writer = Writer(node, rest[0])
        elif what == "end" and writer is not None:
            written = writer.end()
            acknowledged += written
            answer = len(written)
        elif what == "missing":
            answer = node.get_many(acknowledged).count(None)
        elif what == "status":
            leader = node._getLeader()
            machine = node.state_machine
            answer = {
                "leader": leader.id if leader else None, "applied": machine.last_applied().index, "keys": machine.len(),
                "snapshots": node.dumps, "installed": node.installs,
            }  # fmt: skip
        print(json.dumps(answer), flush=True)
    node.destroy_synchronous()


# ---- the demonstration ------------------------------------------------------------------------------------


class Cluster:
    def __init__(self, root: Path) -> None:
        self.root = root
        sockets = [socket.socket() for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        self.addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        self.nodes: dict[int, subprocess.Popen[str]] = {}

    def start(self, number: int) -> None:
        own = self.addresses[number]
        partners = [address for address in self.addresses if address != own]
        self.nodes[number] = subprocess.Popen(
            [sys.executable, __file__, "--node", own, ",".join(partners), str(self.root / f"node-{number}")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, number: int, line: str) -> Any:
        node = self.nodes[number]
        assert node.stdin is not None
        assert node.stdout is not None
        print(line, file=node.stdin, flush=True)
        return json.loads(node.stdout.readline())

    def kill(self, number: int) -> None:
        node = self.nodes.pop(number)
        node.kill()
        node.communicate()

    def settle(self) -> tuple[int, dict[str, Any]]:
        """Wait until all running nodes have the same leader and equal states; return the leader and its status."""
        while True:
            told = [self.ask(number, "status") for number in self.nodes]
            same = len({(each["leader"], each["applied"], each["keys"]) for each in told}) == 1
            if same and told[0]["leader"] in self.addresses:
                leader = self.addresses.index(told[0]["leader"])
                if leader in self.nodes:
                    return leader, told[0]
            time.sleep(0.05)

    def act(self, name: str, writer: int, seconds: float, killed: int | None = None) -> int:
        """Write through one node for a while, and kill another one halfway, if given; then print a line."""
        self.ask(writer, f"write {name.replace(' ', '-')}")
        time.sleep(seconds / 2)
        if killed is not None:
            self.kill(killed)
        time.sleep(seconds / 2)
        acknowledged = int(self.ask(writer, "end"))
        self.show(name, acknowledged)
        return acknowledged

    def show(self, name: str, acknowledged: int = 0) -> None:
        leader, told = self.settle()
        installed = sum(self.ask(number, "status")["installed"] for number in self.nodes)
        print(
            f"{name:34} {len(self.nodes)} nodes  leader {leader}  {acknowledged:8,} acknowledged  "
            f"{told['keys']:8,} keys on each  {told['snapshots']} snapshots  {installed} installed"
        )


def play(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as root:
        cluster = Cluster(Path(root))
        try:
            for number in range(3):
                cluster.start(number)
            leader, _ = cluster.settle()
            writer, other = (number for number in range(3) if number != leader)
            total = cluster.act("three nodes", writer, seconds)
            total += cluster.act("the leader is killed under load", writer, seconds, killed=leader)
            total += cluster.act("two go on", writer, seconds)
            cluster.start(leader)
            cluster.show("the third one is back")
            total += cluster.act("three nodes again", other, seconds)
            _, told = cluster.settle()
            lost = cluster.ask(writer, "missing") + cluster.ask(other, "missing")
            print(f"acknowledged in all: {total:,}, keys on each node: {told['keys']:,}, lost: {lost}")
        finally:
            for number in list(cluster.nodes):
                cluster.kill(number)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--node"]:
        serve(sys.argv[2], sys.argv[3].split(","), sys.argv[4])
    else:
        play(float(sys.argv[1]) if len(sys.argv) > 1 else 3)
