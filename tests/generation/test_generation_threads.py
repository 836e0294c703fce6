"""Threads: any two calls at the same time, including snapshots, compactions, installs, resets and closes.

Everything here runs in separate processes, so that a crash or a hang is only a failed test with a traceback.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PATIENCE = 120

COMMON = """
    import faulthandler, itertools, os, random, sys, threading, time, traceback
    from collections import Counter
    import fastsm
    from fastsm import FastStateMachine, NotRunningError, OrderError, SnapshotError
    from fastsm.core import generations

    root = sys.argv[1]
    KEYS = [b"key-%d" % i for i in range(40)]
    SOURCE = 50                 # the entry of the snapshot that is installed
    ENDING = {"clear", "install", "close"}  # they end snapshots and compactions
    logger = __import__("logging").getLogger("fastsm")
    logger.setLevel(100)
    sys.setswitchinterval(0.0005)
    faulthandler.dump_traceback_later(60, exit=True)

    def chunk(index):
        # Every key gets the number of the chunk, in one entry or in many; sizes differ.
        value = b"%d " % index + b"#" * random.choice((0, 10, 300, 2000))
        if index % 3:
            return [(index, 1, fastsm.put_many(KEYS, [value] * len(KEYS)))]
        return [(index + i, 1, fastsm.put(key, value)) for i, key in enumerate(KEYS)]

    def number(value):
        return None if value is None else int(bytes(value).split(b" ")[0])

    def check_whole(values):
        found = {number(value) for value in values}
        assert len(found) <= 1, found

    class Scene:
        def __init__(self, path, names, **options):
            self.path, self.names, self.options = path, names, options
            self.machine = FastStateMachine(path, **options)
            self.machine.apply(chunk(1))
            self.ending = threading.Event()
            self.errors = []
            self.counts = Counter()
            self.reopening = threading.Lock()

        # ---- the calls ---------------------------------------------------------------------------------

        def apply(self, own):
            machine = self.machine
            try:
                results = machine.apply(chunk(machine.last_applied().index + 1))
                assert set(results) in ({True}, {None}), results  # None: another writer was first
            except OrderError:
                self.counts["apply, in vain"] += 1

        def flush(self, own):
            machine = self.machine
            mark = machine.last_applied()
            machine.flush()
            assert self.names & ENDING or machine.durable() >= mark

        def write_snapshot(self, own):
            # An ended snapshot leaves the older file; one that returned is whole, and is the file.
            path = os.path.join(self.path + "-aside", own)
            try:
                written = self.machine.write_snapshot(path, compress=random.choice(("none", "none", "zstd")))
                self.counts[path] = written
            finally:
                names = os.listdir(path) if os.path.exists(path) else []
                assert set(names) <= {"snapshot.fsm"}, names
                assert bool(names) == bool(self.counts[path])
                if names:
                    with fastsm.open_snapshot(path) as snapshot:
                        assert snapshot.metadata == self.counts[path]
                        assert snapshot.keys in (0, len(KEYS)), snapshot
                        snapshot.verify()

        def compact(self, own):
            self.machine.compact()

        def install(self, own):
            self.machine.install_snapshot(None, os.path.join(root, "source"), allow_older=True)

        def clear(self, own):
            self.machine.clear()

        def close(self, own):
            # Closes the machine that the other threads use, and opens it again for them.
            with self.reopening:
                time.sleep(random.random() / 200)
                self.machine.close()
                self.machine = FastStateMachine(self.path, **self.options)

        def read(self, own):
            machine, kind = self.machine, random.randrange(6)
            if kind == 0:
                check_whole(machine.get_many(KEYS))
            elif kind == 1:
                check_whole(dict(machine.items()).values())
            elif kind == 2:
                check_whole(value for _, value in machine.scan_prefix(b"key-").entries)
            elif kind == 3:
                view = machine.get_view(KEYS[0])
                assert view is None or number(view) > 0
            elif kind == 4:
                number(machine.get(KEYS[0]))
            else:
                stats = machine.stats()
                assert stats.keys in (0, len(KEYS)), stats

        # ---- at the same time --------------------------------------------------------------------------

        def allowed(self, name):
            errors = (NotRunningError,) if "close" in self.names else ()
            if name in ("write_snapshot", "compact") and self.names & ENDING:
                return (*errors, SnapshotError)
            return (*errors, SnapshotError) if name == "install" and "close" in self.names else errors

        def repeat(self, name, own):
            try:
                while not self.ending.is_set():
                    try:
                        getattr(self, name)(own)
                        self.counts[name] += 1
                    except self.allowed(name) as error:
                        self.counts[name + ": " + type(error).__name__] += 1
            except BaseException:
                self.errors.append(f"{name} next to {self.names}: " + traceback.format_exc())
                self.ending.set()

        def play(self, names, seconds):
            threads = [
                threading.Thread(target=self.repeat, args=(name, f"{name}-{i}")) for i, name in enumerate(names)]
            for thread in threads:
                thread.start()
            self.ending.wait(seconds)
            self.ending.set()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive(), f"{thread} hangs"
            assert not self.errors, self.errors[0]
            self.judge()
            assert all(self.counts[name] or name in ("write_snapshot", "compact", "install") for name in names)
            return Counter({name: count for name, count in self.counts.items() if isinstance(count, int)})

        def judge(self):
            machine = self.machine
            machine._check()
            check_whole(machine.get_many(KEYS))
            machine.verify()
            state, last = dict(machine.items()), machine.last_applied()
            machine.close()
            machine = FastStateMachine(self.path, verify_on_open="full")
            machine._check()
            assert (dict(machine.items()), machine.last_applied()) == (state, last)
            n = machine.stats().generation
            machine.close()
            assert set(os.listdir(self.path)) <= {f"log-{n}", f"base-{n}", f"table-{n}", "CURRENT", "LOCK", "PUBLISHED"}

    with FastStateMachine(os.path.join(root, "replica")) as replica:
        replica.update_last_applied((SOURCE - 1, 1))
        replica.apply([(SOURCE, 1, fastsm.put_many(KEYS, [b"%d" % SOURCE] * len(KEYS)))])
        replica.write_snapshot(os.path.join(root, "source"))
"""

PAIRS = """
    counts = Counter()
    names = ("apply", "flush", "write_snapshot", "compact", "install", "clear", "close", "read")
    for number_of_pair, pair in enumerate(itertools.combinations_with_replacement(names, 2)):
        faulthandler.dump_traceback_later(60, exit=True)
        generations.SAVE_TABLE_ABOVE = 0 if number_of_pair % 2 else 4 << 20
        scene = Scene(os.path.join(root, f"pair-{number_of_pair}"), set(pair), retain_entries=3)
        counts += scene.play([*pair, *({*pair} - {"clear", "install", "close"})], 0.12)
    assert all(counts[name] > 10 for name in names), counts
    assert counts["write_snapshot: SnapshotError"] and counts["compact: SnapshotError"], counts
    print("fine", dict(counts))
"""

EIGHT_READERS = """
    scene = Scene(
        os.path.join(root, "state"), {"apply", "compact", "write_snapshot", "read"}, retain_entries=5,
        compact_ratio=0, compact_floor=0)
    counts = scene.play(["apply", "apply", "compact", "write_snapshot", *["read"] * 8], 2)
    print("fine", dict(counts), FastStateMachine(os.path.join(root, "state"), read_only=True).stats().generation)
"""

EVERYTHING = """
    names = ["apply", "flush", "write_snapshot", "compact", "compact", "install", "install", "clear", "close", "read"]
    scene = Scene(os.path.join(root, "state"), set(names), retain_entries=3, compact_ratio=0, compact_floor=0)
    print("fine", dict(scene.play(names, 2)))
"""


def run(program: str, directory: Path) -> None:
    """Run a program in another process; fail on a crash, an error or a hang."""
    source = textwrap.dedent(COMMON) + textwrap.dedent(program)
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore::ResourceWarning", "-c", source, str(directory)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"it hangs: {expired.stderr!r}")
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert ended.stdout.startswith("fine"), ended.stdout
    print(ended.stdout)


def test_any_two_calls_at_once_end_well(tmp_path: Path) -> None:
    """Each pair of calls, in two to four threads, gives correct results or the expected errors, and a sound state."""
    run(PAIRS, tmp_path)


def test_eight_readers_during_snapshots_and_compactions(tmp_path: Path) -> None:
    """No reader sees a part of a chunk, during requested compactions and automatic ones after each chunk."""
    run(EIGHT_READERS, tmp_path)


def test_everything_at_once_ends_well(tmp_path: Path) -> None:
    """All calls run at the same time, compactions and installs twice, and leave a sound state."""
    run(EVERYTHING, tmp_path)
