"""Watches compared with the model's list of changes, whatever happens to machine and watch in between."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import fastsm
from fastsm import Change, CompactedError, FastStateMachine, LogId, MemoryStateMachine, Position
from support.faulty import crash_copy
from support.inside import inside

KEYS = [b"", b"a", b"ab", b"abc", b"b", b"ba"]
PREFIXES = [b"", b"a", b"ab", b"b", b"x"]
keys = st.sampled_from(KEYS)
values = st.sampled_from([b"", b"1", b"value" * 20])
single = st.one_of(
    st.builds(fastsm.put, keys, values),
    st.builds(fastsm.put, keys, values),
    st.builds(fastsm.delete, keys),
    st.builds(fastsm.compare_and_swap, keys, st.one_of(st.none(), values), st.one_of(st.none(), values)),
    st.builds(fastsm.noop),
    st.builds(fastsm.add, keys, st.just(1)),
    st.builds(fastsm.delete_prefix, keys),
)
commands = st.one_of(
    single, single, st.builds(fastsm.batch, st.lists(single, max_size=4)), st.builds(fastsm.config, values),
    st.builds(fastsm.open_session))


class Follower:
    """A watch, and everything that a consumer knows: its prefix, the changes it got, and where it began."""

    def __init__(self, watch: Any, prefix: bytes, after: int) -> None:
        self.watch = watch
        self.prefix = prefix
        self.after = after  # the index after which it tells
        self.told: list[Change] = []


class Comparison(RuleBasedStateMachine):
    """One machine, its model, a few followers; each of them has received a prefix of the list, or is lost."""

    @initialize(contiguous=st.booleans(), sync=st.sampled_from(["flush", "apply"]))
    def begin(self, contiguous: bool, sync: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="fastsm-watch-"))
        self.lives = 0
        self.options: dict[str, Any] = {"contiguous": contiguous, "sync": sync, "retain_entries": 0}
        self.fast = FastStateMachine(self.root / "0", **self.options)
        self.model = MemoryStateMachine(contiguous=contiguous)
        self.all = self.model.watch(start=1)
        self.list: list[Change] = []
        self.base = 0
        self.followers: list[Follower] = []

    def teardown(self) -> None:
        if hasattr(self, "fast"):
            inside(self.fast).check()
            self.fast.close()
            shutil.rmtree(self.root)

    def expected(self, follower: Follower) -> list[Change]:
        return [
            change for change in self.list
            if change.index > follower.after and change.key.startswith(follower.prefix)]

    # ---- what happens to the machine ------------------------------------------------------------------

    @rule(chunk=st.lists(commands, min_size=1, max_size=4), term=st.sampled_from([0, 0, 1]), gap=st.integers(1, 3))
    def apply(self, chunk: list[bytes], term: int, gap: int) -> None:
        last = self.model.last_applied()
        gap = 1 if self.options["contiguous"] else gap
        entries = [(last.index + gap + i, max(last.term, 1) + term, command) for i, command in enumerate(chunk)]
        assert self.fast.apply(entries) == self.model.apply(entries)
        self.list += self.all.read(10**6, timeout=0)

    @rule(steps=st.integers(1, 3))
    def pass_entries(self, steps: int) -> None:
        last = self.model.last_applied()
        for one in (self.fast, self.model):
            one.update_last_applied(LogId(last.index + steps, max(last.term, 1)))

    @rule()
    def flush(self) -> None:
        self.fast.flush()

    @rule(back=st.integers(0, 4))
    def compact(self, back: int) -> None:
        applied = self.fast.last_applied().index
        self.fast.compact(max(applied - back, self.fast.stats().base.index))
        self.base = self.fast.stats().base.index

    @rule(crash=st.booleans())
    def reopen(self, crash: bool) -> None:
        """A new process: watches continue from their positions, or raise that they cannot."""
        if crash:
            self.fast.flush()
            self.lives += 1
            crash_copy(self.root / str(self.lives - 1), self.root / str(self.lives))
        self.fast.close()
        self.fast = FastStateMachine(self.root / str(self.lives), **self.options)
        followers, self.followers = self.followers, []
        for follower in followers:
            start = follower.watch.position
            error = None
            try:
                follower.watch = self.fast.watch(follower.prefix, start=Position(*start))
                self.followers.append(follower)
            except CompactedError as caught:
                error = caught
            assert error is None or (error.oldest == self.base + 1 and start.index <= self.base)
            rest = [change for change in self.list if change.index == self.base][start.offset :]
            assert error is None or start.index < self.base or follower.prefix or rest

    @rule(reset=st.booleans())
    def replace(self, reset: bool) -> None:
        """A reset, or the install of the state itself: all watches are lost."""
        if reset:
            self.fast.clear()
            self.model.clear()
        else:
            directory = self.root / "snapshot"
            self.model.write_snapshot(directory)
            self.fast.install_snapshot(None, directory)
            self.model.install_snapshot(None, directory)
        self.base = self.fast.stats().base.index
        for follower in self.followers:
            with pytest.raises(CompactedError) as caught:
                follower.watch.read(timeout=0)
            assert caught.value.oldest == self.base + 1
        self.followers, self.list = [], []
        self.all = self.model.watch()

    # ---- what watches do -------------------------------------------------------------------------------

    @rule(prefix=st.sampled_from(PREFIXES), start=st.one_of(st.none(), st.integers(0, 12)))
    def watch(self, prefix: bytes, start: int | None) -> None:
        applied = self.fast.last_applied().index
        if len(self.followers) >= 4:
            self.followers.pop(0).watch.close()
        if start is None:
            self.followers.append(Follower(self.fast.watch(prefix), prefix, applied))
            return
        index = max(applied - start, 0)
        if max(index, 1) <= self.base:
            with pytest.raises(CompactedError) as caught:
                self.fast.watch(prefix, start=index)
            assert caught.value.oldest == self.base + 1
            return
        self.followers.append(Follower(self.fast.watch(prefix, start=index), prefix, index - 1))

    @rule(number=st.integers(0, 3), limit=st.integers(1, 5), max_bytes=st.sampled_from([0, 20, 1 << 20]),
          one_by_one=st.booleans())  # fmt: skip
    def read(self, number: int, limit: int, max_bytes: int, one_by_one: bool) -> None:
        if number >= len(self.followers):
            return
        follower = self.followers[number]
        place = follower.watch.position
        error = None
        try:
            if one_by_one and len(self.expected(follower)) > len(follower.told):
                told = [next(follower.watch)]
            else:
                told = follower.watch.read(limit, max_bytes=max_bytes, timeout=0)
        except CompactedError as caught:
            error = caught
        if error is not None:
            assert error.oldest == self.base + 1
            assert place.index < self.base or (place.index == self.base and place.offset)
            self.followers.pop(number)
            return
        assert len(told) <= limit
        size = sum(len(change.key) + len(change.value or b"") for change in told)
        assert one_by_one or len(told) <= 1 or size <= max_bytes
        follower.told += told
        expected = self.expected(follower)
        assert follower.told == expected[: len(follower.told)]
        if not told:
            assert follower.told == expected
        position = follower.watch.position
        if told and position.index == told[-1].index:
            so_far = [change for change in follower.told if change.index == position.index]
            assert position.offset == len(so_far) + sum(
                1 for change in self.list
                if change.index == position.index <= follower.after and change.key.startswith(follower.prefix))

    @rule()
    def read_all(self) -> None:
        for number in reversed(range(len(self.followers))):
            self.read(number, 10**6, 1 << 30, False)

    @rule(number=st.integers(0, 3))
    def go_on_elsewhere(self, number: int) -> None:
        """Another watch from the same position returns the same, and so does the model's."""
        if number >= len(self.followers):
            return
        follower = self.followers[number]
        start = follower.watch.position
        if start.index <= self.base:
            return
        rest = self.fast.watch(follower.prefix, start=start).read(10**6, timeout=0)
        assert follower.told + rest == self.expected(follower)
        if start.index <= self.model.last_applied().index:
            assert self.model.watch(follower.prefix, start=start).read(10**6, timeout=0) == rest


@pytest.mark.usefixtures("quiet")
def test_watches_agree_with_the_list_of_changes() -> None:
    """A random history of applies, compactions, installs, resets, restarts and kills between reads of any size."""
    run_state_machine_as_test(
        Comparison,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]))
