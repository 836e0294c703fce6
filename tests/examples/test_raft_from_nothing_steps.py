"""The example raft_from_nothing, at steps that a run of a cluster seldom reaches."""

from __future__ import annotations

import asyncio
import importlib
import runpy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastsm import FastStateMachine, LogId, RaftLog, noop, open_snapshot, put
from support.inside import inside
from support.small_cluster import EXAMPLE, imported_example


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """Provide the example's module ``node``."""
    with imported_example() as node:
        yield node


def state_as_of(folder: Path, applied: LogId) -> None:
    """Make a state into which a leader's snapshot as of an entry was installed."""
    with FastStateMachine(folder / "leader", contiguous=False) as leader:
        leader.apply([(*applied, noop())])
        leader.write_snapshot(folder / "sent")
    with FastStateMachine(folder / "state") as state:
        state.install_snapshot(None, folder / "sent")


@pytest.mark.parametrize("last", [40, 50, 60])
def test_a_log_of_another_history_than_the_state_begins_after_it(
    tmp_path: Path, example: ModuleType, last: int
) -> None:
    """After a kill between an install and the log's compaction, entries that were never committed do not stay.

    They are removed before and after the snapshot's entry, count in no election, and are not back at the next start.
    """
    with RaftLog(tmp_path / "log") as log:
        log.append([(index, 2, noop()) for index in range(1, last + 1)])
    state_as_of(tmp_path, LogId(50, 3))
    for _ in range(2):
        storage = example.Storage(tmp_path, [])
        assert (storage.log.first_index, storage.log.last_index, storage.log.last_term) == (51, 50, 3)
        assert storage.log.durable_index == 50
        asyncio.run(storage.close())


def test_a_log_that_the_state_agrees_with_is_kept(tmp_path: Path, example: ModuleType) -> None:
    """If the state ends at an entry that the log holds, no entries of the log are dropped."""
    with RaftLog(tmp_path / "log") as log:
        log.append([(index, 2, noop()) for index in range(1, 61)])
    state_as_of(tmp_path, LogId(50, 2))
    storage = example.Storage(tmp_path, [])
    assert (storage.log.first_index, storage.log.last_index) == (1, 60)
    asyncio.run(storage.close())


def test_a_node_that_lost_entries_of_its_log_can_send_a_snapshot(tmp_path: Path, example: ModuleType) -> None:
    """A node whose log lost entries that its state kept has a snapshot for followers that lack them."""
    with RaftLog(tmp_path / "log") as log, FastStateMachine(tmp_path / "state") as state:
        entries = [(index, 1, noop()) for index in range(1, 51)]
        log.append(entries[:40])
        state.apply(entries[:30])
        state.write_snapshot(tmp_path / "snapshots")
        state.apply(entries[30:])
    storage = example.Storage(tmp_path, [])
    assert storage.log.first_index == 51
    with open_snapshot(storage.snapshots) as snapshot:
        assert snapshot.metadata.last_included == LogId(50, 1)
    asyncio.run(storage.close())


class PausedSnapshots(FastStateMachine):
    """A machine whose snapshots continue only after another state was installed."""

    async def generate_snapshot_data(self, *arguments: Any, **options: Any) -> bytes:
        def pause(*_: object) -> None:
            self.began.set()
            while self.last_applied().index == 1:
                time.sleep(0.001)

        return await super().generate_snapshot_data(*arguments, progress=pause, **options)


def test_an_install_ends_a_node_s_own_snapshot_and_nothing_else(tmp_path: Path, example: ModuleType) -> None:
    """A follower that installs a leader's snapshot while it writes its own continues with the leader's."""
    with FastStateMachine(tmp_path / "leader", contiguous=False) as leader:
        leader.apply([(90, 1, put(b"color", b"blue"))])
        sent = leader.write_snapshot(tmp_path / "sent")

    async def install_meanwhile() -> None:
        storage = example.Storage(tmp_path / "node", [])
        storage.machine.close()
        storage.machine = PausedSnapshots(tmp_path / "node" / "state")
        storage.machine.began = threading.Event()
        storage.append([(1, 1, put(b"color", b"red"))])
        storage.machine.apply(storage.log.entries(1, 1))
        own = asyncio.ensure_future(storage.take_snapshot(0))
        while not storage.machine.began.is_set():
            await asyncio.sleep(0)
        storage.expect_snapshot(sent)
        with open_snapshot(tmp_path / "sent") as snapshot:
            storage.receiver.write(0, snapshot.read_at(0, snapshot.size))
        assert await storage.install() == LogId(90, 1)
        await own
        assert (storage.machine.get(b"color"), storage.log.first_index) == (b"blue", 91)
        await storage.close()

    asyncio.run(install_meanwhile())


def test_a_leader_that_is_deposed_at_once_appends_nothing_in_the_new_term(tmp_path: Path, example: ModuleType) -> None:
    """A node that is deposed before its first task as a leader begins appends no entry in the new term."""

    async def be_deposed() -> None:
        node = example.Node("a", tmp_path, {"a": ("127.0.0.1", 0)}, ["a"])
        node.log.save_hard_state(5, b"a")
        node.term = 5
        inside(node).lead()
        inside(node).follow(6, "b")
        await asyncio.gather(*node.tasks)
        assert [entry.term for entry in node.log.entries(1, node.log.last_index)] == [5]
        await node.storage.close()

    asyncio.run(be_deposed())


def test_a_leader_takes_no_command_that_it_could_not_send_on(tmp_path: Path, example: ModuleType) -> None:
    """A leader refuses a command that would not fit into its message to a follower, and appends nothing."""

    async def ask() -> dict[str, object]:
        node = example.Node("a", tmp_path, {"a": ("127.0.0.1", 0)}, ["a"])
        node.role = "leader"
        try:
            reply, _ = await inside(node).answer({"type": "propose"}, bytes(example.LARGEST_COMMAND + 1))
            assert node.log.last_index == 0
            return dict(reply)
        finally:
            await node.storage.close()

    assert "at most" in str(asyncio.run(ask())["refused"])


def test_the_measurement_goes_on_when_the_leader_changes(
    tmp_path: Path, example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A put whose outcome is unknown, as happens when a slow machine elects another leader, is not counted."""
    client = importlib.import_module("client")
    real, calls = client.Client.propose, 0

    async def propose(self: Any, command: bytes) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise client.OutcomeUnknown("another node leads now")
        return await real(self, command)

    monkeypatch.setattr(client.Client, "propose", propose)
    measure = runpy.run_path(str(EXAMPLE / "__main__.py"))["measure"]

    async def run() -> None:
        await measure(tmp_path, 2, 1)
        for _ in range(3):
            await asyncio.sleep(0)  # connections that were closed at the end are still closing

    asyncio.run(run())
    assert calls > 3
    assert "2 clients: " in capsys.readouterr().out
