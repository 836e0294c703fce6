"""A cluster of `examples/raft_from_nothing` in separate processes, its network, and the faults of both."""

from __future__ import annotations

import asyncio
import importlib
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsm import FastStateMachine, Reader, add, compare_and_swap, put
from support.linearizability import UNKNOWN, Operation

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "raft_from_nothing"
KEYS = (b"x", b"y", b"z")


def client_module() -> ModuleType:
    """Import the example's client, which imports its siblings as a program in that folder would."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import client  # type: ignore[import-not-found]  # noqa: PLC0415
    finally:
        sys.path.remove(str(EXAMPLE))
    assert isinstance(client, ModuleType)
    return client


MODULES = ("node", "storage", "wire", "client")


@contextmanager
def imported_example() -> Iterator[ModuleType]:
    """Import the example's module ``node``, which imports its siblings as a program in that folder would."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module("node")
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
    return port


class Wire:
    """The connection from one node to another: a proxy that can delay or lose what is sent."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.open = asyncio.Event()
        self.open.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        address: int = self._server.sockets[0].getsockname()[1]
        return address

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.open.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(1 << 16):
                await self.open.wait()
                writer.write(piece)
                await writer.drain()
        writer.close()

    def lose(self) -> None:
        """Break every connection: delayed data is lost."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self.lose()
        self._server.close()


class Cluster:
    """Nodes in separate processes, in folders of one directory. The first members are ``members``."""

    def __init__(self, directory: Path, names: str, members: str, snapshot_every: int) -> None:
        self.directory, self.names, self.snapshot_every = directory, names, snapshot_every
        self.first_members = self.members = members
        self.ports = {name: free_port() for name in names}
        self.addresses = {name: ("127.0.0.1", port) for name, port in self.ports.items()}
        self.wires: dict[tuple[str, str], Wire] = {}
        self.seen_as: dict[str, dict[str, int]] = {}
        self.nodes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self) -> None:
        for name in self.names:
            self.seen_as[name] = {name: self.ports[name]}
            for other in self.names.replace(name, ""):
                wire = self.wires[name, other] = Wire(self.ports[other])
                self.seen_as[name][other] = await wire.start()
        for name in self.names:
            await self.start_node(name)

    async def start_node(self, name: str) -> None:
        addresses = [f"--address={other}=127.0.0.1:{port}" for other, port in self.seen_as[name].items()]
        log = (self.directory / f"{name}.txt").open("ab")
        with log:
            self.nodes[name] = await asyncio.create_subprocess_exec(
                sys.executable, str(EXAMPLE), f"--name={name}", f"--folder={self.directory / name}",
                f"--members={','.join(self.first_members) if name in self.first_members else ''}",
                f"--snapshot-every={self.snapshot_every}", *addresses,
                cwd=self.directory, stdout=log, stderr=log)

    async def kill(self, name: str) -> None:
        node = self.nodes.pop(name)
        assert node.returncode is None, f"{name} ended: {(self.directory / f'{name}.txt').read_text()[-3000:]}"
        node.kill()
        await node.wait()

    def cut(self, names: str, *, lose: bool) -> None:
        """Cut these nodes off from the others, in both directions."""
        for (one, other), wire in self.wires.items():
            if (one in names) != (other in names):
                wire.open.clear()
                if lose:
                    wire.lose()

    def heal(self) -> None:
        for wire in self.wires.values():
            wire.open.set()

    async def settle(self, seconds: float = 60) -> None:
        """Wait until all members have applied the same entries, as readers of their directories see it."""
        stop = asyncio.get_running_loop().time() + seconds
        with ExitStack() as stack:
            readers = [stack.enter_context(Reader(self.directory / name / "state")) for name in self.members]
            while len(applied := {reader.refresh() for reader in readers}) > 1:
                assert asyncio.get_running_loop().time() < stop, applied
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        self.heal()
        for name in list(self.nodes):
            await self.kill(name)
        for wire in self.wires.values():
            await wire.close()

    def states(self) -> list[tuple[Any, ...]]:
        """Return the checksum of each member's state as of the last entry that all have applied."""
        machines = [FastStateMachine(self.directory / name / "state") for name in self.members]
        try:
            least = min(machine.last_applied() for machine in machines)
            return [machine.state_checksum(least) for machine in machines]
        finally:
            for machine in machines:
                machine.close()


class Nemesis:
    """Makes one fault in a cluster after the other, by a seed; each is repaired before the next."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self.cluster, self.dice = cluster, dice
        self.counts: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        stop = asyncio.get_running_loop().time() + seconds
        works: list[Callable[[], Any]] = [self._kill_one, self._kill_all, self._hold, self._lose, self._pause]
        while asyncio.get_running_loop().time() < stop:
            work = self.dice.choice(works)
            await work()
            self.counts[work.__name__[1:]] += 1
            await asyncio.sleep(self.dice.uniform(0.3, 1.2))

    async def change_members(self, seconds: float) -> None:
        """Add or remove a node again and again, whatever faults happen meanwhile."""
        cluster, client = self.cluster, client_module().Client(self.cluster.addresses, timeout=1.0)
        stop = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < stop:
            others = [name for name in cluster.names if name not in cluster.members]
            grows = len(cluster.members) <= 2 or (others and self.dice.random() < 0.5)
            one = self.dice.choice(others if grows else cluster.members)
            members = cluster.members + one if grows else cluster.members.replace(one, "")
            await client.change_members(list(members))
            cluster.members = members
            self.counts["members"] += 1
            await asyncio.sleep(self.dice.uniform(0, 0.5))
        client.close()

    async def _down(self, names: str) -> None:
        for name in names:
            await self.cluster.kill(name)
        await asyncio.sleep(self.dice.uniform(0, 0.8))
        for name in names:
            await self.cluster.start_node(name)

    async def _kill_one(self) -> None:
        await self._down(self.dice.choice(self.cluster.names))

    async def _kill_all(self) -> None:
        await self._down(self.cluster.names)

    async def _hold(self) -> None:
        self.cluster.cut(self.dice.choice(self.cluster.names), lose=False)
        await asyncio.sleep(self.dice.uniform(0.3, 1.5))
        self.cluster.heal()

    async def _lose(self) -> None:
        self.cluster.cut(self.dice.choice(self.cluster.names), lose=True)
        await asyncio.sleep(self.dice.uniform(0.3, 1.5))
        self.cluster.heal()

    async def _pause(self) -> None:
        node = self.cluster.nodes[self.dice.choice(self.cluster.names)]
        node.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.dice.uniform(0.8, 2.0))
        node.send_signal(signal.SIGCONT)


class Load:
    """Clients that read, write and swap a few keys, and some that count; their results are recorded."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self.cluster, self.dice = cluster, dice
        self.module = client_module()
        self.over = False
        self.seen: dict[bytes, list[Operation]] = {key: [] for key in KEYS}
        self.counted = 0
        self.value = 0

    def _client(self) -> Any:
        # Clients with a long timeout wait for a paused leader's late answer, while others reach the next leader.
        return self.module.Client(self.cluster.addresses, timeout=self.dice.choice((0.4, 3.0)))

    def _unique(self) -> bytes:
        self.value += 1
        return b"%d" % self.value

    async def use_keys(self) -> None:
        """Run one client of all keys."""
        now, client, known = asyncio.get_running_loop().time, self._client(), dict.fromkeys(KEYS)
        while not self.over:
            key, kind = self.dice.choice(KEYS), self.dice.choice(("get", "get", "put", "swap"))
            new, called = self._unique(), now()
            argument: Any = {"get": None, "put": new, "swap": (known[key], new)}[kind]
            try:
                if kind == "get":
                    result: Any = await client.get(key)
                    known[key] = result
                else:
                    command = put(key, new) if kind == "put" else compare_and_swap(key, known[key], new)
                    result = (await client.propose(command))["ok"]
            except self.module.OutcomeUnknown:
                self.seen[key].append(Operation(called, UNKNOWN, kind, argument))
            else:
                self.seen[key].append(Operation(called, now(), kind, argument, result if kind != "put" else None))
        client.close()

    async def count(self) -> None:
        """Run one client that adds one again and again, and waits for each answer."""
        client = self._client()
        while not self.over:
            assert (await client.propose_once(add(b"count", 1)))["ok"]
            self.counted += 1
        client.close()

    async def final(self) -> bytes | None:
        """Return the value of the count after all faults are repaired."""
        client = self._client()
        try:
            value: bytes | None = await client.get(b"count")
            return value
        finally:
            client.close()


async def trial(
    directory: Path, seconds: float, seed: int, *, snapshot_every: int = 300, changes: bool = False
) -> dict[str, Any]:
    """Run a cluster under load and faults; return what clients saw and counted, and the states that are left.

    With ``changes``, its members change, too.
    """
    dice = random.Random(seed)
    cluster = Cluster(directory, "abcde" if changes else "abc", "abc", snapshot_every)
    load, nemesis = Load(cluster, dice), Nemesis(cluster, dice)
    await cluster.start()
    try:
        clients = [asyncio.ensure_future(work()) for work in [load.use_keys] * 4 + [load.count] * 2]
        await asyncio.gather(nemesis.run(seconds), *([nemesis.change_members(seconds)] if changes else []))
        load.over = True
        await asyncio.wait_for(asyncio.gather(*clients), 300)
        counted = await asyncio.wait_for(load.final(), 300)
        await cluster.settle()  # the followers learn the commit index with the next heartbeat
    finally:
        await cluster.stop()
    return {
        "seen": load.seen, "counted": load.counted, "count": int(counted or b"0"), "befell": nemesis.counts,
        "states": cluster.states()}
