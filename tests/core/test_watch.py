"""Watches: every change in order, without gaps or duplicates; if entries are gone, an error says how to continue."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import (
    Change,
    CompactedError,
    FastStateMachine,
    MemoryStateMachine,
    NotRunningError,
    Position,
    ReentryError,
    batch,
    delete,
    put,
)
from fastsm.generation.watch import Watch
from support.inside import inside

Opener = Callable[..., FastStateMachine]
LONG = 60.0  # seconds: longer than anything takes


def fill(machine: Any, *commands: bytes, term: int = 1) -> None:
    """Apply each command as an entry, all of them in one chunk."""
    first = machine.last_applied().index + 1
    machine.apply([(first + i, term, command) for i, command in enumerate(commands)])


def changes(*told: tuple[int, bytes, bytes | None], term: int = 1) -> list[Change]:
    return [Change(index, term, key, value) for index, key, value in told]


class Consumer:
    """A thread that makes one call; `wait_until_it_waits` returns once its watch is waiting."""

    def __init__(self, machine: FastStateMachine, call: Callable[[], Any]) -> None:
        self._machine = machine
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.wait_until_it_waits()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def wait_until_it_waits(self) -> None:
        watchers = inside(self._machine).watchers
        while self._thread.is_alive() and len(watchers) == 0:
            threading.Event().wait(0.001)

    def end(self) -> Any:
        self._thread.join(LONG)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


# ---- what is told ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["fast", "model"])
def test_every_put_and_every_delete_is_told(kind: str, directory: Path, machine_at: Opener) -> None:
    """Each put and delete is a change, even of an absent key or repeatedly of one key; nothing else is."""
    machine: Any = machine_at(directory) if kind == "fast" else MemoryStateMachine()
    watch = machine.watch()
    fill(
        machine,
        put(b"a", b"1"),
        delete(b"absent"),
        batch([put(b"a", b"2"), put(b"a", b"3"), delete(b"a")]),
        fastsm.compare_and_swap(b"a", None, b"4"),
        fastsm.compare_and_swap(b"a", b"other", b"5"),
        fastsm.compare_and_swap(b"a", b"4", None),
        fastsm.noop(),
        fastsm.config(b"members"),
        fastsm.open_session(),
        fastsm.once(9, 1, put(b"b", b"")),
        fastsm.add(b"n", 7),
        fastsm.delete_prefix(b""),
        fastsm.forget(9),
        fastsm.compare_and_swap(b"gone", None, None),
        fastsm.transaction([fastsm.absent(b"x")], [delete(b"x"), put(b"x", b"1")]),
    )
    assert watch.read() == changes(
        (1, b"a", b"1"), (2, b"absent", None), (3, b"a", b"2"), (3, b"a", b"3"), (3, b"a", None), (4, b"a", b"4"),
        (6, b"a", None), (10, b"b", b""), (11, b"n", b"7"), (12, b"b", None), (12, b"n", None), (14, b"gone", None),
        (15, b"x", None), (15, b"x", b"1"))
    assert watch.position == Position(15, 1, 2)
    assert watch.read(timeout=0) == []


def test_a_procedure_tells_what_it_wrote(directory: Path, machine_at: Opener) -> None:
    """The puts and deletes of a call are changes, in the order in which it made them."""

    @fastsm.procedure
    def move(tx: Any, payload: bytes) -> None:
        tx.put(b"to", tx.get(b"from"))
        tx.delete(b"from")
        tx.delete(b"never")

    machine = machine_at(directory, procedures=[move])
    model = MemoryStateMachine(procedures=[move])
    for one in (machine, model):
        watch = one.watch(start=1)
        fill(one, put(b"from", b"1"), fastsm.call("move"))
        assert watch.read() == changes(
            (1, b"from", b"1"), (2, b"to", b"1"), (2, b"from", None), (2, b"never", None))


def test_only_the_prefix_is_told(directory: Path, machine_at: Opener) -> None:
    """Other keys are passed, and the position moves past them; a key shorter than the prefix does not match."""
    machine = machine_at(directory)
    watch = machine.watch(b"ab")
    fill(machine, put(b"a", b""), put(b"ab", b"1"), put(b"abc", b"2"), put(b"b", b""), put(b"", b""))
    assert watch.read() == changes((2, b"ab", b"1"), (3, b"abc", b"2"))
    assert watch.position == Position(5, 1, 0)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_prefix_is_any_bytes_like_object(wrap: Any, directory: Path, machine_at: Opener) -> None:
    """The prefix is copied at the call."""
    machine = machine_at(directory)
    watch = machine.watch(wrap(b"a"))
    fill(machine, put(b"a", b"1"))
    assert len(watch.read()) == 1


def test_limits_split_an_entry_and_lose_nothing(directory: Path, machine_at: Opener) -> None:
    """A read's limits are a number of changes, and bytes of keys and values; a larger change is returned alone."""
    machine = machine_at(directory)
    fill(machine, batch([put(b"%d" % i, b"v" * size) for i, size in enumerate([9, 100, 9, 9])]))
    watch = machine.watch(start=1)
    assert [len(change.value or b"") for change in watch.read(max_bytes=20)] == [9]
    assert watch.position == Position(1, 1, 1)
    assert [len(change.value or b"") for change in watch.read(max_bytes=20)] == [100]
    assert [len(change.value or b"") for change in watch.read(max_bytes=19)] == [9]
    assert watch.read(0) == []
    assert [len(change.value or b"") for change in watch.read(5, max_bytes=0)] == [9]
    assert watch.position == Position(1, 1, 4)


@pytest.mark.parametrize("arguments", [{"limit": -1}, {"max_bytes": -1}, {"timeout": -1}, {"timeout": float("nan")}])
def test_bad_arguments_of_a_read(arguments: dict[str, Any], directory: Path, machine_at: Opener) -> None:
    """Bad arguments are refused, and the next read works."""
    watch = machine_at(directory).watch()
    with pytest.raises(ValueError, match="expected 0 or more"):
        watch.read(**arguments)
    assert watch.read(timeout=0) == []


@pytest.mark.parametrize("start", [-1, 2**64 - 1, (-1, 0, 0), (1, 2**64, 0), (1, 1, -1)])
def test_bad_numbers_to_start_at(start: Any, directory: Path, machine_at: Opener) -> None:
    """A bad start index is a `ValueError`; an object that is neither an index nor a position is a `TypeError`."""
    machine = machine_at(directory)
    for one in (machine, MemoryStateMachine()):
        with pytest.raises(ValueError, match="expected"):
            one.watch(start=start)
        wrongs: list[Any] = [(1, 1), "1", 1.0, (1, 1, 0, 0)]
        for wrong in wrongs:
            with pytest.raises(TypeError):
                one.watch(start=wrong)


def test_very_many_changes_come_whole(directory: Path, machine_at: Opener) -> None:
    """More changes than fit in one step, with a prefix among mebibytes of others, one by one and all together."""
    machine = machine_at(directory)
    keys = [b"%s-%d" % (b"x" if i % 3 == 0 else b"y", i) for i in range(30_000)]
    fill(machine, *(put(key, b"v" * 40) for key in keys[:20_000]))
    fill(machine, batch([put(key, b"v" * 40) for key in keys[20_000:]]))
    expected = [key for key in keys if key.startswith(b"x")]
    assert [change.key for change in machine.watch(b"x", start=1).read(10**6)] == expected
    assert [change.key for change in machine.watch(start=1).read(10**6, max_bytes=10**9)] == keys
    watch = machine.watch(b"x", start=1)
    assert [next(watch).key for _ in expected] == expected
    assert machine.watch(b"z", start=1).read(timeout=0) == []


# ---- where it starts --------------------------------------------------------------------------------------

def test_it_goes_on_from_any_position(directory: Path, machine_at: Opener) -> None:
    """From each position that a watch had, another watch returns exactly the rest, even after a restart or a kill."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"), batch([put(b"b", b"1"), put(b"a", b"2"), delete(b"b")]), fastsm.noop())
    fill(machine, put(b"c", b"1"), term=3)
    watch = machine.watch(start=1)
    positions, told = [watch.position], []
    while found := watch.read(1, timeout=0):
        told += found
        positions.append(watch.position)
    assert len(told) == 5
    machine.close()
    machine = machine_at(directory)
    for number, position in enumerate(positions):
        for start in (position, (position.index, position.term, position.offset)):
            assert machine.watch(start=start).read(timeout=0) == told[number:]
            assert machine.watch(start=start).position == position


@pytest.mark.parametrize("prefix", [b"", b"b"])
def test_without_a_start_it_begins_after_what_is_applied(prefix: bytes, directory: Path, machine_at: Opener) -> None:
    """Another watch at its position returns nothing that it does not."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"), batch([put(b"b", b"1"), put(b"b", b"2")]))
    for one in range(3):
        watch = machine.watch(prefix)
        again = machine.watch(prefix, start=watch.position)
        assert again.read(timeout=0) == []
        fill(machine, put(b"b", b"%d" % one))
        assert watch.read() == again.read() == changes((machine.last_applied().index, b"b", b"%d" % one))
        machine.flush()  # a frame without entries comes last


def test_an_index_that_is_to_come(directory: Path, machine_at: Opener) -> None:
    """A watch that starts at a future index returns changes from that entry on, and nothing before it."""
    machine = machine_at(directory)
    watch = machine.watch(start=3)
    assert watch.position == Position(2, None, 0)
    fill(machine, put(b"a", b"1"), put(b"a", b"2"))
    assert watch.read(timeout=0) == []
    fill(machine, put(b"a", b"3"))
    assert watch.read() == changes((3, b"a", b"3"))


def test_a_position_that_was_lost_with_the_power_waits_for_its_entry(directory: Path, machine_at: Opener) -> None:
    """A delivered entry that was lost is not delivered again when it comes back; with another term it is an error."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"))
    same = machine.watch(start=Position(2, 1, 1))
    other = machine.watch(start=Position(2, 9, 1))
    fill(machine, put(b"a", b"2"))
    fill(machine, put(b"a", b"3"))
    assert same.read() == changes((3, b"a", b"3"))
    with pytest.raises(CompactedError, match="another term") as caught:
        other.read()
    assert caught.value.oldest == 1


@pytest.mark.parametrize("term", [1, 9])
def test_a_position_of_an_entry_to_come_is_woken_by_it(term: int, directory: Path, machine_at: Opener) -> None:
    """A read that waits for the rest of that entry gets it with the entry, or an error if its term differs."""
    machine = machine_at(directory)
    consumer = Consumer(machine, machine.watch(start=Position(2, term, 1)).read)
    fill(machine, put(b"a", b"1"), batch([put(b"a", b"2"), put(b"b", b"2")]))
    if term == 1:
        assert consumer.end() == changes((2, b"b", b"2"))
    else:
        with pytest.raises(CompactedError, match="another term"):
            consumer.end()


def test_a_position_of_another_history_is_an_error_at_once(directory: Path, machine_at: Opener) -> None:
    """A position whose term is not that of its entry is an error."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"), put(b"a", b"2"))
    model = MemoryStateMachine()
    fill(model, put(b"a", b"1"), put(b"a", b"2"))
    for one in (machine, model):
        with pytest.raises(CompactedError) as caught:
            one.watch(start=Position(2, 7, 1))
        assert caught.value.oldest == 1


# ---- compaction, install, reset ---------------------------------------------------------------------------

def test_compaction_moves_a_watch(directory: Path, machine_at: Opener) -> None:
    """A watch continues in the next log, even within an entry; if its entries are compacted, it says what is left."""
    machine = machine_at(directory, retain_entries=0)
    watch, late = machine.watch(), machine.watch()
    for i in range(1, 11):
        fill(machine, batch([put(b"a", b"%d" % i), put(b"b", b"%d" % i)]))
    told = watch.read(11, timeout=20)
    assert watch.position == Position(6, 1, 1)
    machine.compact(5)
    told += watch.read(1, timeout=20)
    assert watch.position == Position(6, 1, 2)
    machine.compact(6)
    told += watch.read(100, timeout=20)
    assert [(change.index, change.key) for change in told] == [(i, k) for i in range(1, 11) for k in (b"a", b"b")]
    for _ in range(2):
        with pytest.raises(CompactedError, match="oldest possible start is 7") as caught:
            late.read(timeout=20)
        assert caught.value.oldest == 7
    assert len(machine.watch(start=caught.value.oldest).read(timeout=20)) == 8
    with pytest.raises(CompactedError):
        machine.watch(start=6)
    with pytest.raises(CompactedError):
        machine.watch(start=Position(5, 1, 2))


def test_a_watch_that_delivered_everything_survives_a_compaction(directory: Path, machine_at: Opener) -> None:
    """With the log empty, a watch that has delivered everything continues; one within the last entry is lost."""
    machine = machine_at(directory, retain_entries=0)
    whole, part = machine.watch(), machine.watch()
    fill(machine, batch([put(b"a", b"1"), put(b"b", b"1")]))
    assert len(whole.read(2)) == 2
    assert len(part.read(1)) == 1
    machine.compact()
    fill(machine, put(b"a", b"2"))
    assert whole.read() == changes((2, b"a", b"2"))
    with pytest.raises(CompactedError):
        part.read()


def test_a_position_that_was_told_whole_outlives_compaction_and_restart(directory: Path, machine_at: Opener) -> None:
    """The base records how many changes its last entry had: only a position between them is refused."""
    machine = machine_at(directory, retain_entries=0)
    fill(machine, put(b"a", b"1"), batch([put(b"a", b"2"), put(b"b", b"1")]))
    watch = machine.watch(start=1)
    positions = [watch.position for _ in iter(lambda: watch.read(1, timeout=0), [])]
    machine.compact()
    fresh = machine.watch().position
    machine.close()
    machine = machine_at(directory)
    fill(machine, put(b"c", b"1"))
    for start in (positions[-1], fresh, Position(2, 1, 2), 3):
        assert machine.watch(start=start).read() == changes((3, b"c", b"1"))
    for start in (positions[0], positions[1], Position(2, 1, 0), Position(2, 2, 2)):
        with pytest.raises(CompactedError) as caught:
            machine.watch(start=start)
        assert caught.value.oldest == 3
    assert machine.watch(b"c", start=Position(2, 1, 0)).read() == changes((3, b"c", b"1"))


def test_a_reset_ends_watches_and_an_install_too(tmp_path: Path, directory: Path, machine_at: Opener) -> None:
    """Even at the same entry; undelivered changes before it are gone. A new watch begins after it."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"))
    before = machine.watch(start=1)
    machine.write_snapshot(tmp_path / "out")
    machine.install_snapshot(None, tmp_path / "out")
    with pytest.raises(CompactedError) as caught:
        before.read(timeout=0)
    assert caught.value.oldest == 2
    watch = machine.watch()
    fill(machine, put(b"a", b"2"))
    assert watch.read() == changes((2, b"a", b"2"))
    machine.clear()
    with pytest.raises(CompactedError) as caught:
        next(watch)
    assert caught.value.oldest == 1
    with pytest.raises(CompactedError):
        next(watch)


@pytest.mark.parametrize("how", ["reset", "install"])
def test_a_waiting_read_ends_when_the_state_is_replaced(
    how: str, tmp_path: Path, directory: Path, machine_at: Opener
) -> None:
    """A waiting read gets the error as soon as the state is replaced."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"))
    machine.write_snapshot(tmp_path / "out")
    consumer = Consumer(machine, machine.watch(b"never").read)
    if how == "reset":
        machine.clear()
    else:
        machine.install_snapshot(None, tmp_path / "out")
    with pytest.raises(CompactedError):
        consumer.end()


def test_a_wait_outlives_any_number_of_compactions(directory: Path, machine_at: Opener) -> None:
    """Changes that do not concern a waiting watch are passed, even if they are compacted immediately."""
    machine = machine_at(directory, retain_entries=0)
    consumer = Consumer(machine, machine.watch(b"x").read)
    for i in range(5):
        fill(machine, put(b"y", b"%d" % i))
        fill(machine, put(b"y", b"%d" % i))
        machine.compact()
    fill(machine, put(b"x", b"1"))
    machine.compact(machine.last_applied().index - 1)
    assert consumer.end() == changes((11, b"x", b"1"))


def test_old_logs_are_not_held_by_a_watch(directory: Path, machine_at: Opener) -> None:
    """Neither a watch that is read now and then nor one that waits holds a generation's disk space."""
    machine = machine_at(directory, retain_entries=0)
    fill(machine, put(b"a", b"v" * 100_000))
    idle = machine.watch(start=1)
    idle.read()
    consumer = Consumer(machine, machine.watch(b"x").read)
    fill(machine, put(b"a", b""))
    machine.compact()
    fill(machine, put(b"x", b""))
    consumer.end()
    assert machine.stats().pinned_bytes == 0
    assert inside(idle).source.mapping is None


# ---- durable ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sync", ["flush", "apply"])
def test_durable_watches_tell_what_survives(sync: Any, directory: Path, machine_at: Opener) -> None:
    """Nothing is delivered before its sync, and everything afterwards; a waiting watch is woken by the sync."""
    machine = machine_at(directory, sync=sync)
    watch = machine.watch(durable=True)
    fill(machine, put(b"a", b"1"))
    if sync == "flush":
        assert watch.read(timeout=0) == []
        assert machine.watch(start=1, durable=True).read(timeout=0) == []
        machine.flush()
    assert watch.read() == changes((1, b"a", b"1"))
    consumer = Consumer(machine, watch.read)
    fill(machine, put(b"a", b"2"))
    if sync == "flush":
        machine.save_hard_state()
    assert consumer.end() == changes((2, b"a", b"2"))


def test_a_durable_watch_is_woken_by_a_compaction(directory: Path, machine_at: Opener) -> None:
    """Everything applied is durable after a compaction."""
    machine = machine_at(directory, retain_entries=1)
    fill(machine, put(b"a", b"1"))
    machine.flush()
    consumer = Consumer(machine, machine.watch(durable=True).read)
    fill(machine, put(b"a", b"2"))
    machine.compact(1)
    assert consumer.end() == changes((2, b"a", b"2"))


# ---- ends -------------------------------------------------------------------------------------------------

def test_closing_the_machine_ends_iterations_and_reads(directory: Path, machine_at: Opener) -> None:
    """A loop ends; a waiting read, and every later one, raises `NotRunningError`."""
    machine = machine_at(directory)
    iteration = Consumer(machine, lambda: list(machine.watch()))
    watch = machine.watch()
    reader = Consumer(machine, watch.read)
    machine.close()
    assert iteration.end() == []
    with pytest.raises(NotRunningError):
        reader.end()
    with pytest.raises(NotRunningError):
        watch.read(timeout=0)
    assert list(watch) == []
    with pytest.raises(NotRunningError):
        machine.watch()


def test_stopping_the_machine_is_an_error_for_all(directory: Path, machine_at: Opener) -> None:
    """Iterations raise too, since the machine may start again; then they continue."""
    machine = machine_at(directory)
    watch = machine.watch()
    consumer = Consumer(machine, lambda: next(watch))
    machine.stop()
    with pytest.raises(NotRunningError):
        consumer.end()
    with pytest.raises(NotRunningError):
        watch.read(timeout=0)
    with pytest.raises(NotRunningError):
        machine.watch()
    machine.start()
    fill(machine, put(b"a", b"1"))
    assert watch.read() == changes((1, b"a", b"1"))


def test_closing_a_watch_ends_it(directory: Path, machine_at: Opener) -> None:
    """Closing a watch ends it, even while another thread waits; the machine and its other watches continue."""
    machine = machine_at(directory)
    other = machine.watch()
    with machine.watch() as watch:
        consumer = Consumer(machine, watch.read)
    with pytest.raises(NotRunningError, match="this watch is closed"):
        consumer.end()
    assert list(watch) == []
    watch.close()
    fill(machine, put(b"a", b"1"))
    assert len(other.read()) == 1
    assert isinstance(watch, Watch)


def test_a_second_concurrent_read_of_a_watch_is_refused(directory: Path, machine_at: Opener) -> None:
    """A second concurrent read is refused, and does not disturb the first."""
    machine = machine_at(directory)
    watch = machine.watch()
    consumer = Consumer(machine, watch.read)
    for call in (lambda: watch.read(timeout=0), lambda: next(watch)):
        with pytest.raises(ReentryError, match="being read already"):
            call()
    assert watch.position == Position(0, 0, 0)
    fill(machine, put(b"a", b"1"))
    assert len(consumer.end()) == 1


def test_a_wait_ends_with_its_timeout(directory: Path, machine_at: Opener) -> None:
    """The result is an empty list; nothing remains, and passed changes stay passed."""
    machine = machine_at(directory)
    watch = machine.watch(b"x")
    consumer = Consumer(machine, lambda: watch.read(timeout=0.2))
    fill(machine, put(b"a", b"1"))
    assert consumer.end() == []
    assert len(inside(machine).watchers) == 0


def test_a_signal_handler_ends_a_wait_and_nothing_is_lost(directory: Path, machine_at: Opener) -> None:
    """The handler's exception is passed on; the next read returns what came."""
    machine = machine_at(directory)
    watch = machine.watch()

    def interrupt() -> None:
        while len(inside(machine).watchers) == 0:
            threading.Event().wait(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        watch.read()
    thread.join()
    assert len(inside(machine).watchers) == 0
    fill(machine, put(b"a", b"1"))
    assert watch.read() == changes((1, b"a", b"1"))


def test_an_interruption_by_another_thread_ends_a_wait(directory: Path, machine_at: Opener) -> None:
    """The waiting main thread checks for signals, even for those that did not wake it."""
    machine = machine_at(directory)
    watch = machine.watch()
    ended: list[bool] = []

    def interrupt() -> None:
        watchers = inside(machine).watchers
        while len(watchers) == 0:
            threading.Event().wait(0.001)
        _thread.interrupt_main()
        for _ in range(5000):
            if len(watchers) == 0:
                break
            threading.Event().wait(0.001)
        ended.append(len(watchers) == 0)
        fill(machine, put(b"a", b"1"))

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        watch.read()
    thread.join()
    assert ended == [True]


def test_a_callback_amid_a_write_cannot_wait_for_a_change(tmp_path: Path, directory: Path, machine_at: Opener) -> None:
    """If its own thread holds writers up, no change could come: `ReentryError`; a look without waiting works."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"))
    machine.write_snapshot(tmp_path / "out")
    watch = machine.watch(start=1)
    seen: list[Any] = []

    @fastsm.procedure
    def look(tx: Any, payload: bytes) -> None:
        pass

    with inside(machine).turns:
        seen.append(watch.read(timeout=0))
        with pytest.raises(ReentryError):
            watch.read()
    assert len(seen[0]) == 1


def test_a_watch_begins_to_wait_while_a_procedure_runs(directory: Path, machine_at: Opener) -> None:
    """A watch that begins to wait while a procedure runs does not poll: the procedure sees that it waits."""
    waited: list[bool] = []

    @fastsm.procedure
    def look(tx: Any, payload: bytes) -> None:
        thread.start()
        watchers = inside(machine).watchers
        for _ in range(2000):
            if len(watchers):
                break
            threading.Event().wait(0.001)
        waited.append(len(watchers) == 1)
        tx.put(b"key", b"1")

    machine = machine_at(directory, procedures=[look])
    found: list[Change] = []
    watch = machine.watch()
    thread = threading.Thread(target=lambda: found.extend(watch.read()))
    fill(machine, fastsm.call("look"))
    thread.join(LONG)
    assert waited == [True]
    assert found == changes((1, b"key", b"1"))


def test_a_procedure_cannot_watch(directory: Path, machine_at: Opener) -> None:
    """A procedure may only use its tx: a read on its thread ends the apply with a `ProcedureError`."""
    watches: list[Any] = []

    @fastsm.procedure
    def look(tx: Any, payload: bytes) -> None:
        watches[0].read(timeout=0)

    machine = machine_at(directory, procedures=[look])
    watches.append(machine.watch())
    with pytest.raises(fastsm.ProcedureError):
        fill(machine, fastsm.call("look"))
    assert watches[0].read(timeout=0) == []


def test_a_child_that_was_forked_reads_nothing(directory: Path, machine_at: Opener) -> None:
    """The child's copies of machine and watch raise an error."""
    machine = machine_at(directory)
    watch = machine.watch()
    child = os.fork()
    if child == 0:
        told = 0
        for call in (lambda: watch.read(timeout=0), lambda: next(watch), machine.watch):
            try:
                call()
            except NotRunningError:
                told += 1
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    fill(machine, put(b"a", b"1"))
    assert len(watch.read()) == 1


def test_read_only_machines_tell_what_is_there(directory: Path, machine_at: Opener) -> None:
    """Watches of a read-only machine return the changes of its fixed state, and none to come."""
    machine = machine_at(directory)
    fill(machine, put(b"a", b"1"))
    with FastStateMachine(directory, read_only=True) as other:
        watch = other.watch(start=1)
        assert watch.read() == changes((1, b"a", b"1"))
        assert watch.read(timeout=0) == []


# ---- who is woken -----------------------------------------------------------------------------------------

def test_only_those_are_woken_whom_a_change_concerns(directory: Path, machine_at: Opener) -> None:
    """Of many prefixes, some of them prefixes of others, exactly those of a changed key are woken."""
    machine = machine_at(directory)
    prefixes = [b"", b"a", b"ab", b"abc", b"abd", b"b", b"ba", b"c\x00", b"c\xff" * 100]
    consumers = {}
    for prefix in prefixes:
        consumers[prefix] = Consumer(machine, partial(machine.watch(prefix).read, timeout=LONG))
        while len(inside(machine).watchers) < len(consumers):
            threading.Event().wait(0.001)
    fill(machine, put(b"abc-key", b"1"))
    for prefix in (b"", b"a", b"ab", b"abc"):
        assert len(consumers.pop(prefix).end()) == 1
    assert len(inside(machine).watchers) == len(consumers)
    fill(machine, put(b"c", b""), put(b"c\x01", b""), put(b"ab", b""), put(b"b", b""))
    assert consumers.pop(b"b").end() == changes((5, b"b", b""))
    assert len(inside(machine).watchers) == len(consumers)
    fill(machine, put(b"abd", b""), put(b"ba", b""), put(b"c\x00", b""), put(b"c\xff" * 100, b""))
    for consumer in consumers.values():
        assert len(consumer.end()) == 1


def test_a_writer_rings_once_for_many_chunks(directory: Path, machine_at: Opener) -> None:
    """Idle watches cost a writer only the check of a flag: the thread hears of many chunks at a time."""
    machine = machine_at(directory)
    consumer = Consumer(machine, machine.watch(b"x").read)
    for i in range(1, 2001):
        machine.apply([(i, 1, put(b"y", b""))])
    fill(machine, put(b"x", b""))
    assert consumer.end() == changes((2001, b"x", b""))
