"""The end of a PySyncObj node: wherever it is destroyed, all callers are answered and nothing stays open."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from pysyncobj import FAIL_REASON, SyncObjConsumer, replicated
from pysyncobj.batteries import ReplCounter

import fastsm
from support.one_node import Answers, MakeNode, answer, nodes_at, ticks


@pytest.fixture
def node_at(tmp_path: Path) -> Iterator[MakeNode]:
    """Provide a function that makes nodes of a cluster of one each, which the test ticks itself."""
    with nodes_at(tmp_path) as make:
        yield make


class Ending(SyncObjConsumer):  # type: ignore[misc]
    """A consumer whose method ends its node."""

    @replicated
    def end(self) -> None:
        self._syncObj.destroy()


def by_answer(node: Any, made: Ending) -> None:
    node.put(b"a", b"b", callback=lambda *_: node.destroy())
    node.put(b"a", b"c")


def by_method(node: Any, made: Ending) -> None:
    made.end()
    node.put(b"a", b"c")


def by_tick(node: Any, made: Ending) -> None:
    node.put(b"a", b"b")
    node.addOnTickCallback(node.destroy)


def by_change(node: Any, made: Ending) -> None:
    node.put(b"end", b"")
    node.put(b"a", b"c")


def by_state(node: Any, made: Ending) -> None:
    node.conf.onStateChanged = lambda *_: node.destroy()


def by_ready(node: Any, made: Ending) -> None:
    node.conf.onReady = node.destroy
    node.put(b"a", b"b")


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("how", [by_answer, by_method, by_tick, by_change, by_state, by_ready])
def test_a_node_ends_in_the_middle_of_a_tick(
    node_at: MakeNode, tmp_path: Path, how: Callable[[Any, Ending], None], durable: bool
) -> None:
    """Any user function may destroy the node within a tick: no failure, all are answered, the directory is free."""
    failures: list[BaseException] = []
    ending, made = Ending(), []

    def changed(changes: Any) -> None:
        if changes[0].key == b"end":
            made[0].destroy()

    made.append(node_at(consumers=[ending], durable=durable, on_failure=failures.append, on_change=changed))
    node = made[0]
    if how not in (by_state, by_ready):
        ticks(node, node.isReady)
    waiting = Answers()
    how(node, ending)
    node.put(b"last", b"", callback=waiting)
    ticks(node, lambda: not node.state_machine.is_running())
    assert (failures, node.failure) == ([], None)
    assert [reason for _, reason in waiting] in ([FAIL_REASON.UNKNOWN_OUTCOME], [FAIL_REASON.SUCCESS])
    fastsm.FastStateMachine(tmp_path / "node" / "state").close()
    node.doTick(0)
    with pytest.raises(fastsm.NotRunningError):
        node.put(b"a", b"b")


def test_a_signal_ends_a_node_that_its_thread_ticks(node_at: MakeNode, tmp_path: Path) -> None:
    """A SIGTERM handler may destroy the node at any place of a tick, and the end is as orderly as without a signal."""
    for number in range(20):
        failures: list[BaseException] = []
        node = node_at(name=f"node-{number}", on_failure=failures.append, durable=True)
        ticks(node, node.isReady)
        answers = Answers()
        previous = signal.signal(signal.SIGALRM, lambda *_, node=node: node.destroy())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * (number + 1))
            while node.state_machine.is_running():
                try:
                    node.put(b"key", bytes(100), callback=answers)
                except fastsm.NotRunningError:
                    break
                node.doTick(0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        node.doTick(0)
        assert (failures, node.failure) == ([], None)
        assert not node.state_machine.is_running()
        assert len(node._fastsm_waiting) == 0


def test_another_thread_ends_a_node_that_ticks(node_at: MakeNode) -> None:
    """A destroy by another thread ends a long tick immediately, and waits for it."""
    node = node_at(conf={"autoTickPeriod": 0.001})
    ticks(node, node.isReady)
    failures: list[BaseException] = []
    under_way = threading.Event()
    node.addOnTickCallback(under_way.set)

    def tick() -> None:
        try:
            while node.state_machine.is_running():
                node.doTick(600)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=tick)
    thread.start()
    assert under_way.wait(20)
    node.destroy()
    assert not node.state_machine.is_running()
    thread.join(20)
    assert (failures, node.failure, thread.is_alive()) == ([], None, False)


class Unruly(SyncObjConsumer):  # type: ignore[misc]
    def _destroy(self) -> None:
        raise ValueError("the user's own")


def test_a_consumer_whose_end_raises_keeps_nothing_open(node_at: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """If a consumer's end raises, it is logged, pending calls are answered, and the directory is free."""
    counter = ReplCounter()
    node = node_at(partners=("127.0.0.1:1",), consumers=[Unruly(), counter])
    answers = Answers()
    node.put(b"a", b"b", callback=answers)
    node.destroy()
    assert answers == [(None, FAIL_REASON.UNKNOWN_OUTCOME)]
    assert counter._syncObj is None
    assert "the user's own" in caplog.text
    node_at(consumers=[Unruly(), counter])


def end(node: Any, ticking: bool) -> None:
    if ticking:
        node.destroy_synchronous()
    else:
        node.destroy()


def open_files() -> list[str]:
    """Return the targets of the process's descriptors, except for terminals and pytest's own."""
    found = []
    for each in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{each}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return sorted(found)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("ticking", [False, True])
def test_a_node_that_has_ended_has_nothing_open(node_at: MakeNode, ticking: bool) -> None:
    """A node that has ended has no open files, sockets, or pipe by which PySyncObj's thread is woken."""
    conf = {"autoTick": True} if ticking else {}
    end(node_at(name="first", conf=conf), ticking)
    before = open_files()
    for number in range(3):
        node = node_at(name=f"node-{number}", conf=conf, partners=("127.0.0.1:1",))
        node.put(b"a", b"b")
        for _ in range(0 if ticking else 5):
            node.doTick(0.001)
        end(node, ticking)
    held = 3  # the ports of the three nodes, which the test holds
    assert len(open_files()) == len(before) + held


def test_a_forked_child_says_that_the_node_is_not_its_own(node_at: MakeNode) -> None:
    """In a forked child a call raises instead of waiting for ever; the parent's node continues."""
    node = node_at(conf={"autoTick": True})
    node.put(b"a", b"b", sync=True, timeout=20)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            node.put(b"a", b"c", sync=True)
        except fastsm.NotRunningError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert node.put(b"a", b"d", sync=True, timeout=20) is True
    node.destroy_synchronous()


def test_a_signal_handler_may_submit_in_the_middle_of_a_submission(node_at: MakeNode) -> None:
    """A signal handler within a submission may submit, because no lock is held that it would wait for."""
    node = node_at()
    ticks(node, node.isReady)
    answers = Answers()
    commands = node._SyncObj__commandsQueue

    class Interrupted(deque[Any]):
        """A queue that sends a signal whenever an item is put in or taken out."""

        def append(self, item: Any) -> None:
            super().append(item)
            handle()

        def popleft(self) -> Any:
            handle()
            return super().popleft()

    def handle() -> None:
        if len(answers) < 20 and not handling:
            handling.append(True)
            node.put(b"signal", b"", callback=answers)
            handling.pop()

    handling: list[bool] = []
    commands._FastQueue__queue = Interrupted(commands._FastQueue__queue)
    thread = threading.Thread(target=lambda: [node.put(b"key", b"", callback=answers), node.doTick(0)], daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    ticks(node, lambda: len(node._fastsm_waiting) == 0)
    assert set(answers) == {(True, FAIL_REASON.SUCCESS)}


def test_a_tick_callback_may_take_itself_away(node_at: MakeNode) -> None:
    """A tick callback may remove itself and add another one."""
    node = node_at()
    called: list[str] = []

    def once() -> None:
        called.append("once")
        node.removeOnTickCallback(once)
        node.addOnTickCallback(lambda: called.append("other"))

    node.addOnTickCallback(once)
    for _ in range(3):
        node.doTick(0)
    assert called.count("once") == 1
    assert "other" in called


def test_a_wait_without_end_is_one(node_at: MakeNode) -> None:
    """timeout=inf waits without a limit, and does not raise OverflowError after the command was queued."""
    node = node_at(conf={"autoTick": True})
    assert node.put(b"a", b"b", sync=True, timeout=float("inf")) is True
    answers = Answers()
    node.put(b"a", b"b", callback=answers, timeout=float("inf"))
    assert node.put(b"a", b"b", sync=True, timeout=1e12) is True
    assert answers == [(True, FAIL_REASON.SUCCESS)]


def test_a_relative_directory_stays_where_it_was(
    node_at: MakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the current folder changes, as in a daemon, dumps still go to the node's directory, and nowhere else."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    counter = ReplCounter()
    node = node_at(consumers=[counter], directory="data")
    ticks(node, node.isReady)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert answer(node, counter.inc) == (1, FAIL_REASON.SUCCESS)
    node.forceLogCompaction()
    ticks(node, lambda: node.dumps)
    node.destroy()
    assert os.listdir(tmp_path / "elsewhere") == []
    assert (tmp_path / "data" / "snapshot" / "snapshot.fsm").exists()


def test_a_procedure_cannot_end_its_node(node_at: MakeNode) -> None:
    """A procedure that destroys its node gets a ``ProcedureError``, which stops the node, and does not hang."""
    made: list[Any] = []

    @fastsm.procedure
    def end_it(tx: Any, payload: bytes) -> None:
        made[0].destroy()

    made.append(node_at(procedures=[end_it]))
    ticks(made[0], made[0].isReady)
    made[0].call("end_it")
    ticks(made[0], lambda: made[0].failure)
    assert isinstance(made[0].failure, fastsm.ProcedureError)
