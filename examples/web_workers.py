"""A Raft node and four web workers: each worker answers reads from a ``Reader``, without a request to the node.

The node applies entries all the time. The workers answer ``GET /reader/KEY`` from a reader that was opened before they
were forked and, for comparison, ``GET /node/KEY`` by a request to the node over a socket. Then the node is killed, the
reads continue, and another node takes over. Needs starlette and uvicorn: ``pip install "fastsm[web]"``.

Run: ``python examples/web_workers.py [seconds for each measurement]``
"""

from __future__ import annotations

import asyncio
import http.client
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import fastsm

WORKERS = 4
CLIENTS = 2
KEYS = 10_000
CHUNK = 20  # entries per chunk; the node applies some hundred chunks a second

fork = multiprocessing.get_context("fork")


# ---- the node ----------------------------------------------------------------------------------------

async def node(directory: Path) -> NoReturn:
    """Apply entries, which a Raft library would supply, and answer clients over a socket."""
    async with fastsm.FastStateMachine.open_async(directory / "state") as machine:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while key := await reader.readline():
                writer.write((machine.get(key.strip()) or b"") + b"\n")
                await writer.drain()

        path = directory / "node.socket"
        path.unlink(missing_ok=True)
        await asyncio.start_unix_server(answer, path)
        while True:
            index = machine.last_applied().index
            await machine.apply_chunk([
                (i, 1, fastsm.put(b"key-%d" % (i % KEYS), b"%d" % i)) for i in range(index + 1, index + 1 + CHUNK)])
            await asyncio.sleep(0.002)


# ---- a worker ----------------------------------------------------------------------------------------

def worker(directory: Path, reader: fastsm.Reader, listening: socket.socket) -> None:
    """Run one process of the web service, with a reader that was opened before the fork."""
    connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []  # idle connections to the node

    async def from_reader(request: Request) -> Response:
        index = reader.refresh().index
        value = reader.get(request.path_params["key"].encode())
        return Response(value or b"", headers={"entry": str(index)})

    async def from_node(request: Request) -> Response:
        connection = connections.pop() if connections else await asyncio.open_unix_connection(directory / "node.socket")
        connection[1].write(request.path_params["key"].encode() + b"\n")
        value = await connection[0].readline()
        connections.append(connection)
        return Response(value.rstrip(b"\n"))

    app = Starlette(routes=[Route("/reader/{key}", from_reader), Route("/node/{key}", from_node)])
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off")).run(sockets=[listening])


# ---- the load ----------------------------------------------------------------------------------------

def client(port: int, path: str, seconds: float, results: Any) -> None:
    """Request one key after the other; report the number of answers and the entry that the last one was as of."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    answers, entry = 0, 0
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        connection.request("GET", f"{path}/key-{answers * 7919 % KEYS}")
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        answers += 1
        entry = int(response.headers.get("entry", 0))
    connection.close()
    results.put((answers, entry))


def load(port: int, path: str, seconds: float) -> tuple[int, int]:
    """Run the clients; return the answers per second of all together, and the last entry that they saw."""
    results = fork.Queue()
    clients = [fork.Process(target=client, args=(port, path, seconds, results)) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    found = [results.get() for _ in clients]
    for one in clients:
        one.join()
        assert one.exitcode == 0
    return round(sum(answers for answers, _ in found) / seconds), max(entry for _, entry in found)


# ---- all together ------------------------------------------------------------------------------------

def start_node(directory: Path) -> BaseProcess:
    process = fork.Process(target=lambda: asyncio.run(node(directory)))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def main(seconds: float) -> None:
    """Measure both ways of reading, kill the node, and let another one take over."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        directory = Path(name)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = listening.getsockname()[1]
        running = start_node(directory)
        with fastsm.Reader(directory / "state", wait_for_owner=60) as reader:
            reader.wait(KEYS, 60)
            workers = [fork.Process(target=worker, args=(directory, reader, listening)) for _ in range(WORKERS)]
            for one in workers:
                one.start()
            try:
                rate, entry = load(port, "/reader", seconds)
                asked, _ = load(port, "/node", seconds)
                print(f"{'from a Reader':24} {rate:8,} answers a second, up to entry {entry:,}")
                print(f"{'asked over a socket':24} {asked:8,} answers a second")
                kill(running)
                rate, before = load(port, "/reader", seconds)
                print(f"{'with the node killed':24} {rate:8,} answers a second, up to entry {before:,}")
                running = start_node(directory)
                reader.wait(before + KEYS // 10, 60)
                rate, entry = load(port, "/reader", seconds)
                print(f"{'with the next node':24} {rate:8,} answers a second, up to entry {entry:,}")
                print("the reads went on:", entry > before)
            finally:
                for process in (running, *workers):
                    kill(process)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5)
