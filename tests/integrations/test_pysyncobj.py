"""`fastsm.integrations.pysyncobj`: the behaviour of one node. Clusters are in test_pysyncobj_cluster.py."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

import pysyncobj.pickle
import pysyncobj.syncobj
from pysyncobj import FAIL_REASON, SyncObjConf, SyncObjException
from pysyncobj.batteries import ReplCounter

import fastsm
from fastsm.integrations.pysyncobj import (
    DivergedError,
    DumpPolicy,
    FastJournal,
    ReplicatedStateMachine,
    SubmitError,
    UnsupportedVersionError,
    compatibility,
    transport,
)
from support.cluster import free_ports

MakeNode = Callable[..., ReplicatedStateMachine]


@pytest.fixture
def node_at(tmp_path: Path) -> Iterator[MakeNode]:
    """Provide a function that makes nodes of a cluster of one each; they end with the test."""
    nodes: list[ReplicatedStateMachine] = []

    def make(name: str = "node", partners: tuple[str, ...] = (), **options: Any) -> ReplicatedStateMachine:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        conf = options.pop("conf", None) or SyncObjConf(
            bindAddress=address, appendEntriesUseBatch=False, autoTickPeriod=0.01)
        node = ReplicatedStateMachine(address, partners, tmp_path / name, conf=conf, **options)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.destroy_synchronous()


def wait_until(condition: Callable[[], Any]) -> None:
    stop = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_the_package_needs_no_pysyncobj() -> None:
    """`import fastsm` imports neither PySyncObj nor the integration."""
    names = "('pysyncobj', 'fastsm.integrations')"
    code = f"import sys, fastsm; sys.exit(any(name.startswith({names}) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- commands ------------------------------------------------------------------------------------------


def test_submit_gives_what_apply_said(node_at: MakeNode) -> None:
    """Waiting callers and callbacks get the results of apply; the shorthands do what their commands do."""
    node = node_at()
    assert node.put(b"a", b"1", sync=True, timeout=20) is True
    assert node.compare_and_swap(b"a", b"2", b"3", sync=True, timeout=20) is False
    assert node.batch([fastsm.put(b"b", b"2"), fastsm.delete(b"a")], sync=True, timeout=20) is True
    assert node.delete(b"nothing", sync=True, timeout=20) is True
    assert node.sync_read(b"b", timeout=20) == b"2"
    assert node.get_many([b"a", b"b"]) == [None, b"2"]
    view = node.get_view(b"b")
    assert view is not None
    assert bytes(view) == b"2"
    assert node.scan_prefix(b"").entries == [(b"b", b"2")]
    answers: list[Any] = []
    node.put(b"c", b"3", callback=lambda *answer: answers.append(answer))
    wait_until(lambda: answers)
    assert answers == [(True, FAIL_REASON.SUCCESS)]
    index = node.state_machine.last_applied().index
    assert node.raftLastApplied == index
    assert node.journal.last_index == index


def test_commands_are_checked_at_submit(node_at: MakeNode) -> None:
    """A command that apply would refuse is refused by submit."""
    node = node_at()
    for command in (b"", b"\x00\x01", fastsm.put(b"a", b"b")[:-1]):
        with pytest.raises(fastsm.CommandError):
            node.submit(command)
    with pytest.raises(fastsm.UnknownCommandError):
        node.submit(b"\x09" + bytes(7))


def test_no_result_is_an_error_with_its_reason(node_at: MakeNode) -> None:
    """Without a majority a command times out, for a waiting caller and for a callback with a timeout."""
    node = node_at(partners=("127.0.0.1:1",))
    with pytest.raises(SubmitError, match="Timeout") as caught:
        node.put(b"a", b"b", sync=True, timeout=0.3)
    assert isinstance(caught.value, SyncObjException)
    assert caught.value.errorCode == "Timeout"
    answers: list[Any] = []
    node.put(b"a", b"b", callback=lambda *answer: answers.append(answer), timeout=0.1)
    wait_until(lambda: answers)
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]


def test_a_callback_that_raises_does_no_harm(node_at: MakeNode) -> None:
    """After a callback that raises, the node continues, and the next call is answered."""
    node = node_at()

    def raising(result: Any, reason: Any) -> None:
        raise ValueError(result)

    node.put(b"a", b"1", callback=raising)
    assert node.put(b"b", b"2", sync=True, timeout=20) is True
    assert node.failure is None


def test_waiting_in_the_tick_thread_is_refused(node_at: MakeNode) -> None:
    """A callback that waits for another command, which would never end, gets an error."""
    node = node_at()
    errors: list[BaseException] = []

    def waiting(result: Any, reason: Any) -> None:
        try:
            node.put(b"b", b"2", sync=True)
        except SubmitError as error:
            errors.append(error)

    node.put(b"a", b"1", callback=waiting)
    wait_until(lambda: errors)


def test_the_end_answers_everybody(node_at: MakeNode) -> None:
    """Pending callbacks are called when the node is destroyed; afterwards submit raises."""
    node = node_at(partners=("127.0.0.1:1",))
    answers: list[Any] = []
    node.put(b"a", b"b", callback=lambda *answer: answers.append(answer))
    node.destroy_synchronous()
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    with pytest.raises(fastsm.NotRunningError):
        node.put(b"a", b"b")


# ---- life ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_a_restart_goes_on_where_it_was(node_at: MakeNode, durable: bool) -> None:
    """A restart after a dump and one more entry keeps state, journal and term, and applies nothing twice."""
    policy = DumpPolicy(trailing_entries=5)
    node = node_at(durable=durable, policy=policy)
    for number in range(50):
        node.put(b"key-%d" % number, b"x", sync=True, timeout=20)
    node.forceLogCompaction()
    wait_until(lambda: node.dumps == 1)
    wait_until(lambda: node.journal.first_index > 40)
    node.put(b"last", b"x", sync=True, timeout=20)
    entry, term = node.state_machine.modified(b"last"), node.raftCurrentTerm
    node.destroy_synchronous()
    node = node_at(durable=durable, policy=policy)
    assert node.sync_read(b"last", timeout=20) == b"x"
    assert node.state_machine.modified(b"last") == entry
    assert node.state_machine.len() == 51
    assert node.raftCurrentTerm == term + 1
    assert node.journal.first_index > 40


def test_consumers_are_restored_once(node_at: MakeNode) -> None:
    """A PySyncObj consumer is restored from the dump and the entries after it, each applied once."""
    counter = ReplCounter()
    node = node_at(consumers=[counter])
    for _ in range(5):
        counter.inc(sync=True, timeout=20)
    node.forceLogCompaction()
    wait_until(lambda: node.dumps == 1)
    for _ in range(3):
        counter.inc(sync=True, timeout=20)
    node.put(b"a", b"b", sync=True, timeout=20)
    node.destroy_synchronous()
    counter = ReplCounter()
    node = node_at(consumers=[counter])
    node.sync_read(b"a", timeout=20)
    assert counter.get() == 8
    assert counter.inc(sync=True, timeout=20) == 9


def test_a_replicated_method_that_raises_is_passed_over(node_at: MakeNode) -> None:
    """A replicated method that raises is skipped: its caller gets an error, and the node continues."""

    class Raising(ReplCounter):  # type: ignore[misc]
        @pysyncobj.replicated
        def burst(self) -> None:
            raise ValueError("burst")

    counter = Raising()
    node = node_at(consumers=[counter])
    with pytest.raises(SyncObjException):
        counter.burst(sync=True, timeout=20)
    assert counter.inc(sync=True, timeout=20) == 1
    assert node.failure is None


def test_a_journal_of_another_history_is_refused(node_at: MakeNode, tmp_path: Path) -> None:
    """If state and journal disagree on an entry's term, the node does not start."""
    node = node_at()
    node.put(b"a", b"b", sync=True, timeout=20)
    node.destroy_synchronous()
    journal = FastJournal(tmp_path / "node" / "journal")
    last = journal.last_index
    journal.cut(2)
    for index in range(2, last + 1):
        journal.add(b"\x01", index, 99)
    journal.close()
    with pytest.raises(DivergedError):
        node_at()


def test_an_unreadable_end_of_a_durable_journal_is_loud(node_at: MakeNode, tmp_path: Path) -> None:
    """With durable=True a journal that ends before the state is an error, because no crash leaves that."""
    node = node_at(durable=True)
    node.put(b"a", b"b", sync=True, timeout=20)
    node.destroy_synchronous()
    journal = FastJournal(tmp_path / "node" / "journal")
    journal.cut(journal.last_index)
    journal.close()
    with pytest.raises(fastsm.CorruptionError):
        node_at(durable=True)


def test_on_failure_is_called(node_at: MakeNode) -> None:
    """on_failure is called with the reason if a node ends by a failure."""
    heard: list[BaseException] = []
    node = node_at(on_failure=heard.append)
    node.put(b"a", b"b", sync=True, timeout=20)
    node._applyCommand(b"\x07" + bytes(7), None, 0x46)
    wait_until(lambda: heard)
    assert isinstance(heard[0], fastsm.UnknownCommandError)
    assert node.failure is heard[0]
    with pytest.raises(fastsm.NotRunningError, match="version 7"):
        node.put(b"a", b"b")


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["journalFile", "fullDumpFile"])
def test_a_configuration_of_files_is_refused(node_at: MakeNode, name: str) -> None:
    """PySyncObj's settings of journal and dump files are refused, because the node has its own files."""
    with pytest.raises(ValueError, match=name):
        node_at(conf=SyncObjConf(**{name: "somewhere"}))


def test_another_pysyncobj_is_refused(node_at: MakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PySyncObj release that lacks a name, or has another signature, is refused with the releases that work."""
    monkeypatch.setattr(pysyncobj.syncobj.SyncObj, "_SyncObj__applyLogEntries", lambda self, more: None)
    monkeypatch.delattr(pysyncobj.syncobj.SyncObj, "_SyncObj__tryLogCompaction")
    with pytest.raises(UnsupportedVersionError, match=r"tryLogCompaction.*0\.3\.16, 0\.3\.17") as caught:
        node_at()
    assert "applyLogEntries()" in str(caught.value)
    assert not (tmp_path / "node").exists()


def test_this_pysyncobj_works() -> None:
    """The installed PySyncObj has all names that the node needs."""
    assert compatibility.missing() == []


def test_a_node_of_another_wire_version_is_refused(
    node_at: MakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A node refuses one of another wire version, and shows that version in `refused`."""
    ports = free_ports(2)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    nodes = []
    try:
        for number, address in enumerate(addresses):
            conf = SyncObjConf(bindAddress=address, connectionRetryTime=0.1)
            nodes.append(ReplicatedStateMachine(address, addresses, tmp_path / str(number), conf=conf))
        original = transport.FastTransport._post

        def posting(self: Any, node: Any, message: Any) -> None:
            if self is nodes[0]._fastsm_transport and message["type"] == transport.GREETING:
                message = {**message, "version": 99}
            original(self, node, message)

        monkeypatch.setattr(transport.FastTransport, "_post", posting)
        for node in nodes:
            for other in node.otherNodes:
                node._fastsm_transport.disconnect(other)
        wait_until(lambda: "version 99" in nodes[1].refused.get(addresses[0], ""))
    finally:
        for node in nodes:
            node.destroy_synchronous()


@pytest.mark.parametrize("size", [10, 5000, 50_000, 500_000])
def test_messages_are_compressed_where_it_is_worth_it(size: int) -> None:
    """Messages can be read by PySyncObj; compressible ones shrink, and others hardly grow."""
    for content, largest in ((random.randbytes(size), size + 200), (bytes(size), max(200, size // 20))):
        message = {"type": "append_entries", "entries": [(content, 1, 1)]}
        encoded = transport.encode(message)
        assert pysyncobj.pickle.loads(zlib.decompress(encoded)) == message
        assert len(encoded) <= largest or size > transport.LARGE


# ---- FastJournal -----------------------------------------------------------------------------------------


def test_fast_journal_is_a_journal_of_pysyncobj(tmp_path: Path) -> None:
    """FastJournal does what PySyncObj's own journal in memory does."""
    fast, memory = FastJournal(tmp_path), pysyncobj.journal.MemoryJournal()
    assert isinstance(fast, pysyncobj.journal.Journal)
    for journal in (fast, memory):
        for index in range(1, 21):
            journal.add(b"%d" % index, index, 1)
        journal.deleteEntriesFrom(15)
        journal.deleteEntriesTo(3)
        journal.setCurrentTerm(4, "a:1")
    assert fast[:] == memory[:]
    assert (fast[0], fast[-1], fast[2:4], len(fast)) == (memory[0], memory[-1], memory[2:4], len(memory))
    assert (fast.getCurrentTerm(), fast.getVotedForNodeId()) == (4, "a:1")
    assert fast.getRaftCommitIndex() == 1
    fast.setRaftCommitIndex(7)
    fast.onOneSecondTimer()
    fast._destroy()
    fast = FastJournal(tmp_path)
    assert (fast.getCurrentTerm(), fast.getVotedForNodeId(), fast.getRaftCommitIndex()) == (4, "a:1", 7)
    fast.deleteEntriesTo(99)
    assert len(fast) == 0
    fast._destroy()


def test_the_tick_thread_ends(node_at: MakeNode) -> None:
    """The tick thread has ended when destroy_synchronous returns."""
    before = threading.active_count()
    node = node_at()
    node.put(b"a", b"b", sync=True, timeout=20)
    node.forceLogCompaction()
    node.destroy_synchronous()
    wait_until(lambda: threading.active_count() <= before)
