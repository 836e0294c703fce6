"""A small Raft cluster to read, on ``RaftLog`` and ``FastStateMachine``. It is for teaching, not for production.

    python examples/raft_from_nothing                     three nodes in this process: a demonstration
    python examples/raft_from_nothing --load 100          the same nodes with 100 clients: puts per second, syncs
    python examples/raft_from_nothing --name a --folder d --address a=127.0.0.1:7001 …      one node
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from client import Client, OutcomeUnknown
from node import LEADER, Node
from wire import Address

from fastsm import add, put


def free_addresses(names: str) -> dict[str, Address]:
    """Return an unused address on this machine for each name."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    addresses = {name: one.getsockname()[:2] for name, one in zip(names, sockets, strict=True)}
    for one in sockets:
        one.close()
    return addresses


def end(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End the process: a node that cannot continue recovers when it is started again."""
    print(context["message"], flush=True)
    if "exception" in context:
        traceback.print_exception(context["exception"])
    os._exit(1)


async def run_node(options: argparse.Namespace) -> None:
    asyncio.get_running_loop().set_exception_handler(end)
    addresses = {}
    for text in options.address:
        name, _, address = text.partition("=")
        host, _, port = address.rpartition(":")
        addresses[name] = host, int(port)
    node = Node(
        options.name, options.folder, addresses, options.members.split(",") if options.members else [],
        snapshot_every=options.snapshot_every)
    await node.start()
    await asyncio.Event().wait()


async def leader_of(nodes: Iterable[Node]) -> Node:
    """Wait until one of the nodes is the leader, and return it."""
    while True:
        for node in nodes:
            if node.role == LEADER:
                return node
        await asyncio.sleep(0.01)


async def show(folder: Path) -> None:
    addresses = free_addresses("abcd")
    nodes = {name: Node(name, folder / name, addresses, ["a", "b", "c"]) for name in "abc"}
    for node in nodes.values():
        await node.start()
    client = Client(addresses)
    await client.propose_once(put(b"color", b"green"))
    print("put, acknowledged by a majority; read back:", await client.get(b"color"))
    for _ in range(200):
        await client.propose_once(add(b"count", 1))
    print("200 additions came to:", await client.get(b"count"))
    old = await leader_of(nodes.values())
    await old.stop()
    await client.propose_once(put(b"color", b"blue"))
    new = await leader_of([node for node in nodes.values() if node is not old])
    print(f"{old.name}, the leader, was stopped; {new.name} leads in term {new.term}:", await client.get(b"color"))
    nodes["d"] = Node("d", folder / "d", addresses, [])
    await nodes["d"].start()
    await client.change_members(["a", "b", "c", "d"])
    print("a fourth node joined; members:", new.storage.members)
    while nodes["d"].machine.get(b"color") != b"blue":
        await asyncio.sleep(0.01)
    print("it has caught up:", nodes["d"].machine.get(b"color"))
    client.close()
    for node in nodes.values():
        if node is not old:
            await node.stop()


async def measure(folder: Path, clients: int, seconds: float = 5) -> None:
    """Print puts per second. All nodes and clients share one interpreter and one disk: no benchmark of a cluster."""
    addresses = free_addresses("abc")
    nodes = [Node(name, folder / name, addresses, list("abc")) for name in "abc"]
    for node in nodes:
        await node.start()
    first = Client(addresses)
    await first.propose_once(put(b"first", b""))
    first.close()
    before = [(node.log.last_index, node.log.stats().sync_count, node.machine.stats().flush_count) for node in nodes]
    stop = asyncio.get_running_loop().time() + seconds

    async def use() -> int:
        client, count = Client(addresses), 0
        while asyncio.get_running_loop().time() < stop:
            with suppress(OutcomeUnknown):  # the leader has changed, as happens on a slow machine: not counted
                await client.propose(put(b"key-%d" % (count % 1000), b"v" * 100))
                count += 1
        client.close()
        return count

    counts = await asyncio.gather(*(use() for _ in range(clients)))
    print(f"{clients} clients: {sum(counts) / seconds:,.0f} puts a second, acknowledged by a majority")
    for node, (entries, syncs, flushes) in zip(nodes, before, strict=True):
        log, state = node.log.stats(), node.machine.stats()
        print(
            f"  {node.name} ({node.role}): {node.log.last_index - entries} entries, {log.sync_count - syncs} syncs of "
            f"the log, {state.flush_count - flushes} of the state")
        await node.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="the name of the node to run")
    parser.add_argument("--folder", type=Path, help="the folder for its log, state and snapshots")
    parser.add_argument("--address", action="append", default=[], help="name=host:port, once for each node")
    parser.add_argument("--members", help="names of a new cluster's members: a,b,c")
    parser.add_argument("--snapshot-every", type=int, default=10_000, help="entries between two snapshots")
    parser.add_argument("--load", type=int, metavar="CLIENTS", help="measure with this many clients")
    options = parser.parse_args()
    if options.name:
        asyncio.run(run_node(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), options.load) if options.load else show(Path(folder)))


if __name__ == "__main__":
    main()
