"""``fastsm demo``: files become a Raft log, the process that applies it is killed, and everything is compared.

A child process applies a history of entries, which is a function of (files, seed), and acknowledges each chunk. It is
killed with SIGKILL at a random point in the first three quarters, after chunks that were never flushed. This process
then opens the directory, compares every key with a model replayed up to the recovered entry, applies the rest, and
compares every key with its file on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

from fastsm.errors import FastsmError
from fastsm.machine import FastStateMachine
from fastsm.tools.demo_history import Model, chunks, digest, file_names, history, read_file, standard_library
from fastsm.types import Entry, LogId, Recovery
from fastsm.types import Result as AppliedResult
from fastsm.units import size_text, time_text

FLUSH_EVERY = 3  # chunks

Step = Literal["read", "child", "recover", "compare", "rest", "reopen", "verify"]


class DemoError(FastsmError):
    """The demo could not run."""


class MismatchError(DemoError):
    """The state machine does not contain what it should."""


# ---- compare -----------------------------------------------------------------------------------------


def check_value(moment: str, key: bytes, found: bytes | None, expected: bytes | None) -> None:
    """Raises ``MismatchError``, which says how the two differ, unless they are equal."""
    if found == expected:
        return
    name = os.fsdecode(key)
    if found is None or expected is None:
        text = f"{_size(found)}, expected {_size(expected)}"
    else:
        pairs = enumerate(zip(found, expected, strict=False))
        offset = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        text = f"{_size(found)}, expected {_size(expected)}; they differ from offset {offset:,}"
    raise MismatchError(f"{moment}: key {name!r} is {text}")


def _size(value: bytes | None) -> str:
    return "not there" if value is None else f"{len(value):,} bytes"


def check_equal(moment: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise MismatchError(f"{moment}: {what} is {found!r}, expected {expected!r}")


# ---- reports -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a step; ``outcome`` is set when the step is over."""

    step: Step
    done: int
    total: int
    outcome: str | None = None


Reporter = Callable[[Progress], None]


@dataclass(slots=True)
class Work:
    """What one process applied, and the seconds it spent in ``apply`` and ``flush``."""

    entries: int = 0
    command_bytes: int = 0
    apply_seconds: float = 0.0
    flushes: int = 0
    flush_seconds: float = 0.0


@dataclass(slots=True)
class Result:
    """What was done and found; complete if every comparison succeeded."""

    source: str
    directory: str
    seed: int
    chunk: int
    files: int = 0
    file_bytes: int = 0
    entries: int = 0
    terms: int = 0
    command_bytes: int = 0
    acknowledged: LogId = field(default_factory=LogId)
    flushed: LogId = field(default_factory=LogId)
    child: Work = field(default_factory=Work)
    recovered: LogId = field(default_factory=LogId)
    recovered_keys: int = 0
    recovery: Recovery = field(default_factory=Recovery)
    recover_seconds: float = 0.0
    parent: Work = field(default_factory=Work)
    reopening: Recovery = field(default_factory=Recovery)
    reopen_seconds: float = 0.0
    get_seconds: float = 0.0
    log_bytes: int = 0
    seconds: float = 0.0


# ---- the child ---------------------------------------------------------------------------------------


def apply_chunks(
    machine: FastStateMachine, pieces: Iterable[list[Entry]], flush_every: int, flush_before: float = math.inf
) -> Iterator[tuple[str, Entry, Work, list[AppliedResult]]]:
    """Applies and flushes; yields after each what was done, the last entry covered, its cost, and the results.

    Chunks from number ``flush_before`` on are not flushed.
    """
    for number, chunk in enumerate(pieces, 1):
        size = sum(len(entry.command) for entry in chunk)
        begin = time.perf_counter()
        results = machine.apply(chunk)
        yield "applied", chunk[-1], Work(len(chunk), size, time.perf_counter() - begin), results
        if number % flush_every == 0 and number < flush_before:
            begin = time.perf_counter()
            machine.flush()
            yield "flushed", chunk[-1], Work(flushes=1, flush_seconds=time.perf_counter() - begin), []


def child_main() -> None:
    """Runs the child process: orders arrive as one line on stdin, acknowledgements go to stdout as lines."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which receives it too
    orders = json.loads(sys.stdin.readline())
    source = orders["source"]
    files = {name: read_file(source, name) for name in file_names(source)}

    def tell(kind: str, **facts: Any) -> None:
        # One write each, so a line is in the pipe completely or not at all. If the parent is gone, this process ends
        # here.
        os.write(1, json.dumps({"kind": kind, **facts}).encode() + b"\n")

    tell("ready", digest=digest(files))
    try:
        with FastStateMachine(orders["directory"]) as machine:
            pieces = islice(chunks(history(files, orders["seed"]), orders["chunk"]), orders["last_chunk"])
            applying = apply_chunks(machine, pieces, orders["flush_every"], orders["flush_before"])
            for kind, last, work, _ in applying:
                tell(kind, index=last.index, term=last.term, **asdict(work))
            sys.stdin.read()  # waits to be killed with the log not closed; ends when the parent is gone
    except (FastsmError, OSError) as error:
        sys.exit(str(error))


class Child:
    """The parent's end of the child process; leaving the context kills it."""

    def __init__(self, orders: dict[str, Any]) -> None:
        if not sys.executable:
            raise DemoError("sys.executable is empty: no Python to start a second process with")
        # Not -m, which first looks in the current folder, where an unbuilt checkout of fastsm may be; and not the path
        # of this file, whose folder has a types.py. Imported by the path that found this module.
        code = f"import sys; sys.path[:] = {sys.path!r}; from fastsm.tools.demo import child_main; child_main()"
        self._orders = json.dumps(orders).encode() + b"\n"
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
            )
        except BaseException:
            self._complaints.close()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Sends the orders; yields the child's messages as they arrive, and those in the pipe when it is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which shows in the missing acknowledgements
            self._process.stdin.write(self._orders)
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.endswith(b"\n"):
                yield json.loads(line)

    def failure(self) -> DemoError:
        """Returns the reason why the child ended before it was killed."""
        status = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {status}"
        return DemoError(f"the child process ended by itself: {reason}")


# ---- the demo ----------------------------------------------------------------------------------------


class Demo:
    """One run; each method is a step."""

    def __init__(self, result: Result, flush_every: int, report: Reporter) -> None:
        self.result = result
        self.flush_every = flush_every
        self.report = report
        self.files: dict[bytes, bytes] = {}

    def run(self) -> None:
        result = self.result
        self.read()
        self.apply_in_child()
        model = Model()
        entries = history(self.files, result.seed)
        self.report(Progress("recover", 0, 1))
        with self.open(result.flushed) as (machine, result.recover_seconds):
            self.look_at_recovered(machine)
            self.compare(machine, model, islice(entries, result.recovered.index))
            self.apply_rest(machine, model, entries)
            self.report(Progress("reopen", 0, 1))
        with self.open(model.applied) as (machine, result.reopen_seconds):
            self.look_at_reopened(machine, model)
            self.verify(machine)

    @contextlib.contextmanager
    def open(self, durable: LogId) -> Iterator[tuple[FastStateMachine, float]]:
        """Opens the directory; yields the machine, and the seconds that opening took."""
        began = time.perf_counter()
        expected = durable if durable.index else None
        with FastStateMachine(self.result.directory, expect_applied=expected) as machine:
            yield machine, time.perf_counter() - began

    def read(self) -> None:
        """Reads the files, and replays the history once to learn its length."""
        result = self.result
        names = file_names(result.source)
        if not names:
            raise DemoError(f"{result.source}: no files there")
        for done, name in enumerate(names):
            self.progress("read", done, len(names))
            self.files[name] = read_file(result.source, name)
        result.files = len(names)
        result.file_bytes = sum(map(len, self.files.values()))
        term = 0
        for entry in history(self.files, result.seed):
            result.entries += 1
            result.command_bytes += len(entry.command)
            result.terms += entry.term != term
            term = entry.term
        outcome = f"{len(names):,} files, {size_text(result.file_bytes)}"
        self.report(Progress("read", len(names), len(names), outcome))

    def apply_in_child(self) -> None:
        """Lets the child apply up to a random chunk, without flushing the last ones, and kills it soon afterwards.

        It gets no further than three quarters of the history, so that something is left to apply.
        """
        result = self.result
        draw = random.Random(result.seed)
        last_chunk = max(result.entries * 3 // 4 // result.chunk, 1)
        # Some chunks before it are flushed
        last_piece = draw.randint(min(self.flush_every + 1, last_chunk), last_chunk)
        patience = draw.random()  # in chunks
        self.report(Progress("child", 0, result.entries))
        orders = {
            "source": result.source,
            "directory": result.directory,
            "seed": result.seed,
            "chunk": result.chunk,
            "flush_every": self.flush_every,
            "flush_before": last_piece,
            "last_chunk": last_chunk,
        }
        with Child(orders) as child:
            began = time.perf_counter()
            piece = 0
            killed = False
            for message in child.messages():
                if message["kind"] == "ready":
                    if message["digest"] != digest(self.files):
                        raise DemoError(f"{result.source}: files there changed while they were read")
                    began = time.perf_counter()
                    continue
                piece += message["kind"] == "applied"
                self.note(**message)
                if piece == last_piece and not killed:
                    time.sleep(patience * (time.perf_counter() - began) / piece)
                    child.kill()
                    killed = True  # earlier messages are still in the pipe
            if not killed:
                raise child.failure()
        done = result.acknowledged.index
        unflushed = done - result.flushed.index
        outcome = f"kill -9 at {done:,}, {unflushed:,} unflushed"
        self.report(Progress("child", done, result.entries, outcome))

    def note(self, kind: str, index: int, term: int, **work: Any) -> None:
        """Records an acknowledgement."""
        if kind == "applied":
            self.result.acknowledged = LogId(index, term)
            self.report(Progress("child", index, self.result.entries))
        else:
            self.result.flushed = LogId(index, term)
        add(self.result.child, Work(**work))

    def look_at_recovered(self, machine: FastStateMachine) -> None:
        """Checks that no acknowledged entry is lost, and that chunks are complete."""
        result = self.result
        result.recovery = machine.stats().recovery
        result.recovered = machine.last_applied()
        result.recovered_keys = machine.len()
        index, acknowledged = result.recovered.index, result.acknowledged.index
        if index < acknowledged:
            raise MismatchError(f"entry {acknowledged:,} was acknowledged, but only {index:,} are recovered")
        if index > result.entries or (index % result.chunk and index != result.entries):
            raise MismatchError(f"recovered at entry {index:,}: not the end of a chunk of {result.chunk:,}")
        outcome = f"entry {index:,}, in {time_text(result.recover_seconds)}"
        self.report(Progress("recover", 1, 1, outcome))

    def compare(self, machine: FastStateMachine, model: Model, entries: Iterable[Entry]) -> None:
        """Compares every key with the model at the recovered entry, including keys that the model lacks."""
        recovered = machine.last_applied()
        total = recovered.index + len(self.files)
        for entry in entries:
            self.progress("compare", entry.index, total)
            model.apply(entry)
        moment = f"recovered at entry {recovered.index:,}"
        check_equal(moment, "last applied", recovered, model.applied)
        check_equal(moment, "the membership", machine.membership(), model.membership)
        for done, key in enumerate(sorted(self.files.keys() | model.values.keys())):
            self.progress("compare", recovered.index + min(done, len(self.files)), total)
            check_value(moment, key, machine.get(key), model.values.get(key))
        check_equal(moment, "the number of keys", machine.len(), len(model.values))
        self.report(Progress("compare", total, total, f"{machine.len():,} keys equal"))

    def apply_rest(self, machine: FastStateMachine, model: Model, entries: Iterable[Entry]) -> None:
        """Applies the entries that the child did not, and compares the result of each with the model's."""
        result = self.result
        first = result.recovered.index
        total = result.entries - first
        self.report(Progress("rest", 0, total))
        here: list[Entry] = []

        def pieces() -> Iterator[list[Entry]]:
            for chunk in chunks(entries, result.chunk):
                here[:] = chunk
                yield chunk

        for kind, last, work, results in apply_chunks(machine, pieces(), self.flush_every):
            add(result.parent, work)
            if kind == "applied":
                said = [model.apply(entry) for entry in here]
                check_equal(f"applied up to entry {last.index:,}", "the list of results", results, said)
                self.report(Progress("rest", last.index - first, total))
        began = time.perf_counter()
        machine.flush()
        add(result.parent, Work(flushes=1, flush_seconds=time.perf_counter() - began))
        self.report(Progress("rest", total, total, f"{total:,} entries"))

    def look_at_reopened(self, machine: FastStateMachine, model: Model) -> None:
        result = self.result
        stats = machine.stats()
        result.reopening = stats.recovery
        result.log_bytes = stats.log_bytes
        moment = "reopened after a clean close"
        check_equal(moment, "recovery.clean", stats.recovery.clean, True)
        check_equal(moment, "last applied", stats.last_applied, model.applied)
        outcome = f"entry {model.applied.index:,}, in {time_text(result.reopen_seconds)}"
        self.report(Progress("reopen", 1, 1, outcome))

    def verify(self, machine: FastStateMachine) -> None:
        """Compares every key with its file, read again; records the median time of a get, less that of the clock."""
        moment = "at the end of the history"
        names = list(self.files)
        for done, name in enumerate(names):
            self.progress("verify", done, len(names))
            check_value(moment, name, machine.get(name), read_file(self.result.source, name))
        check_equal(moment, "the number of keys", machine.len(), len(names))
        clock, get = time.perf_counter_ns, machine.get
        spent, idle = [], []
        for name in names:
            begin = clock()
            get(name)
            end = clock()
            spent.append(end - begin)
            idle.append(clock() - end)
        self.result.get_seconds = max(statistics.median(spent) - statistics.median(idle), 0) / 1e9
        self.report(Progress("verify", len(names), len(names), f"{len(names):,} files equal"))

    def progress(self, step: Step, done: int, total: int) -> None:
        if done % 64 == 0:
            self.report(Progress(step, done, total))


def add(total: Work, work: Work) -> None:
    for name, value in asdict(work).items():
        setattr(total, name, getattr(total, name) + value)


def run_demo(
    directory: str | None = None,
    *,
    source: str | None = None,
    seed: int = 1,
    chunk: int = 1000,
    flush_every: int = FLUSH_EVERY,
    report: Reporter = lambda progress: None,
) -> Result:
    """Runs the demo in a new or empty ``directory``, which is kept, or in a temporary one.

    Raises ``MismatchError`` if anything is wrong, and other errors of fastsm and ``OSError`` if it could not run. No
    child process is left running, whatever happens.
    """
    if chunk < 1 or flush_every < 1:
        raise ValueError(f"chunk={chunk}, flush_every={flush_every}: expected at least 1")
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if directory is None:
            parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsm-demo-"))
            directory = os.path.join(parent, "state")
        elif os.path.isdir(directory) and os.listdir(directory):
            raise DemoError(f"{directory}: not empty; name a new directory")
        source = os.path.abspath(source or standard_library())
        result = Result(source, os.path.abspath(directory), seed, chunk)
        Demo(result, flush_every, report).run()
    result.seconds = time.perf_counter() - began
    return result
