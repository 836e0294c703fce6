"""The rules of watches, for state machines that have them: every change is delivered, in order, once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Change, CompactedError, NotRunningError, Position, StateMachine
from fastsm.testing.helpers import PUT, apply_chunks, apply_commands, apply_entries
from fastsm.testing.histories import History
from fastsm.testing.waiting import PATIENCE, method_of

MANY = 1 << 20


def told(watch: Any) -> list[tuple[int, bytes, bytes | None]]:
    """Returns all available changes, as (index, key, value)."""
    changes = watch.read(MANY, timeout=0)
    assert all(isinstance(change, Change) for change in changes), "read() gave something other than Changes"
    return [(change.index, change.key, change.value) for change in changes]


class WatchRules:
    """A watch delivers each put and each delete, starting where requested, or raises an error that says why not."""

    @pytest.fixture
    def watched(self, state_machine: StateMachine) -> Any:
        """Returns the state machine if it can be watched; otherwise skips the test."""
        method_of(state_machine, "watch")
        return state_machine

    def test_a_watch_tells_every_write_and_nothing_else(self, watched: Any) -> None:
        """A watch delivers puts, deletes (even of absent keys) and matching swaps, in order; no config and no no-op."""
        watch = watched.watch()
        apply_commands(
            watched, PUT, fastsm.delete(b"absent"), fastsm.noop(), fastsm.config(b"members"),
            fastsm.compare_and_swap(b"key", b"other", b""), fastsm.compare_and_swap(b"key", b"value", None),
            fastsm.batch([fastsm.put(b"a", b"1"), fastsm.put(b"a", b"2"), fastsm.delete(b"a")]),
            fastsm.put_many([b"b", b"b"], [b"1", b"2"]))
        assert told(watch) == [
            (1, b"key", b"value"), (2, b"absent", None), (6, b"key", None), (7, b"a", b"1"), (7, b"a", b"2"),
            (7, b"a", None), (8, b"b", b"2")], "a watch does not deliver what was written"
        assert told(watch) == [], "a change was delivered twice"
        assert watch.position == Position(8, 1, 1), "position is not the last entry, with the number of its changes"

    def test_a_watch_tells_terms(self, watched: Any) -> None:
        """Each change carries its entry's term."""
        watch = watched.watch(start=1)
        apply_entries(watched, (1, 3, PUT), (2, 3, PUT), (3, 5, PUT))
        terms = [change.term for change in watch.read(timeout=0)]
        assert terms == [3, 3, 5], "a change has another term than its entry"

    def test_a_watch_tells_its_prefix_alone(self, watched: Any) -> None:
        """A watch delivers keys with its prefix, including the prefix itself, and no others."""
        watch = watched.watch(b"a\x00")
        apply_commands(watched, *(fastsm.put(key, b"") for key in (b"a", b"a\x00", b"a\x00b", b"a\x01", b"", b"b")))
        assert [key for _, key, _ in told(watch)] == [b"a\x00", b"a\x00b"], "a watch delivers other keys"

    def test_a_watch_goes_on_at_its_position(self, watched: Any) -> None:
        """A new watch delivers exactly what the previous one had not, even within an entry; it may start by index."""
        apply_commands(watched, PUT, fastsm.batch([fastsm.put(b"%d" % i, b"") for i in range(3)]), PUT)
        everything = told(watched.watch(start=1))
        watch = watched.watch(start=1)
        for count in range(len(everything) + 1):
            assert told(watched.watch(start=watch.position)) == everything[count:], "it continues somewhere else"
            assert len(watch.read(1, timeout=0)) == (count < len(everything)), "read(1) does not give one change"
        assert told(watched.watch(start=3)) == everything[-1:], "it does not begin with the entry of an index"

    def test_a_read_has_limits(self, watched: Any) -> None:
        """A read returns at most the requested changes, and bytes of keys and values; a larger change comes alone."""
        watch = watched.watch()
        apply_commands(watched, *(fastsm.put(b"k", bytes(size)) for size in (9, 9, 50, 9)))
        sizes = [[len(change.value) for change in watch.read(max_bytes=20, timeout=0)] for _ in range(3)]
        assert sizes == [[9, 9], [50], [9]], "max_bytes is not respected"
        assert watch.read(0, timeout=0) == [], "read(0) gives something"

    def test_other_histories_are_refused(self, watched: Any) -> None:
        """A position with a term other than its entry's is a ``CompactedError``, which says where a watch can begin."""
        apply_commands(watched, PUT, PUT)
        with pytest.raises(CompactedError) as caught:
            watched.watch(start=Position(2, 9, 1))
        assert caught.value.oldest == 1, "oldest is not the smallest start that works"

    def test_a_reset_ends_watches(self, watched: Any) -> None:
        """After a reset, each later read is a ``CompactedError``; a watch made afterwards delivers later changes."""
        apply_commands(watched, PUT)
        watch = watched.watch()
        asyncio.run(watched.reset())
        apply_commands(watched, PUT)
        for _ in range(2):
            with pytest.raises(CompactedError) as caught:
                watch.read(timeout=0)
            assert caught.value.oldest == 1, "oldest is not the smallest start that works"
        assert told(watched.watch(start=1)) == [(1, b"key", b"value")], "a new watch does not begin after the reset"

    def test_an_install_ends_watches(self, watched: Any, tmp_path: Path) -> None:
        """An install ends watches, even at the same entry; the snapshot's entries cannot be delivered or requested."""
        apply_commands(watched, PUT, PUT)
        watch = watched.watch()
        asyncio.run(watched.generate_snapshot_data(tmp_path, watched.last_applied()))
        asyncio.run(watched.apply_snapshot_from_file(watched.snapshot_metadata(), tmp_path))
        for start in (None, 2):
            with pytest.raises(CompactedError) as caught:
                watch.read(timeout=0) if start is None else watched.watch(start=start)
            assert caught.value.oldest == 3, "oldest is not the smallest start that works"
        watch = watched.watch(start=3)
        apply_commands(watched, fastsm.delete(b"key"))
        assert told(watch) == [(3, b"key", None)], "a watch from the oldest start does not deliver what follows"

    def test_durable_watches_tell_what_is_durable(self, watched: Any) -> None:
        """What is not flushed is not delivered; afterwards it is."""
        watch = watched.watch(durable=True)
        apply_commands(watched, PUT)
        if watched.durable().index == 0:
            assert told(watch) == [], "a change was delivered before it was durable"
        watched.flush()
        assert told(watch) == [(1, b"key", b"value")], "a durable change is not delivered"

    def test_a_stopped_state_machine_tells_nothing(self, watched: Any) -> None:
        """After ``stop`` a watch raises ``NotRunningError``, and after ``start`` it continues."""
        watch = watched.watch()
        apply_commands(watched, PUT)
        watched.stop()
        for call in (lambda: watch.read(timeout=0), lambda: next(watch), watched.watch):
            with pytest.raises(NotRunningError):
                call()
        watched.start()
        assert len(told(watch)) == 1, "a watch does not continue after start()"

    def test_a_coroutine_waits_for_a_change(self, watched: Any) -> None:
        """A waiting coroutine gets the next change with its prefix; cancelling loses none; a closed watch ends."""

        async def main() -> None:
            watch = watched.watch(b"key")
            for cancelled in (False, True):
                waiting = asyncio.ensure_future(watch.read_async())
                await asyncio.sleep(0.01)
                await watched.apply_chunk([(watched.last_applied().index + 1, 1, fastsm.put(b"other", b""))])
                await asyncio.sleep(0.01)
                assert not waiting.done(), "another key ended the wait"
                if cancelled:
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
                await watched.apply_chunk([(watched.last_applied().index + 1, 1, PUT)])
                found = watch.read_async(timeout=0) if cancelled else waiting
                changes = await asyncio.wait_for(found, PATIENCE)
                assert len(changes) == 1, "a change was lost by a cancelled wait, or was delivered twice"
            waiting = asyncio.ensure_future(anext_of(watch))
            await asyncio.sleep(0.01)
            watch.close()
            assert await asyncio.wait_for(waiting, PATIENCE) is None, "an iteration continues after close()"

        asyncio.run(main())

    @pytest.mark.parametrize("seed", range(5))
    def test_chunks_do_not_matter_to_watches(self, watched: Any, seed: int) -> None:
        """A watch delivers a random history as the model does, whatever the chunks and the sizes of reads are."""
        history = History(seed, 60)
        model = fastsm.MemoryStateMachine()
        for chunk in history.chunks(8):
            model.apply(chunk)
        watch = watched.watch(start=1)
        found = []
        for number, chunk in enumerate(history.chunks(8)):
            apply_chunks(watched, chunk)
            found += watch.read(1 + number % 5, timeout=0)
        found += watch.read(MANY, timeout=0)
        assert found == model.watch(start=1).read(MANY, timeout=0), "the changes are not those of the history"


async def anext_of(watch: Any) -> Change | None:
    """Returns the next change of an asynchronous iteration; None at its end."""
    async for change in watch:
        return change  # type: ignore[no-any-return]
    return None
