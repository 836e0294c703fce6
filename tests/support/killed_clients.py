"""Clients of a process that is killed again and again: acknowledged results are true, and each command counts once.

A service has a committed log and a hundred clients, each with a session and an account. For each life of the process
it appends entries: deposits in `once` (a batch, a transaction or a procedure in turns), each of them up to three times,
like clients that get no answer; leases that are put, touched and removed by ticks; sessions with deadlines; and the
commands of a history. The process applies them, flushes, compacts and acknowledges, until it is killed. Then

- its state is that of the model after some whole chunks, no fewer than it acknowledged: values, deadlines, clock and,
  by the checksum, sessions with the answers that they remember;
- the results that it acknowledged are the model's;
- some of the entries that it did not apply count as never committed, and clients without an answer ask again.

At the end every account equals the number of its client's deposits. This file is also the program of that process.
"""

from __future__ import annotations

import contextlib
import marshal
import mmap
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generation.test_kill import JOBS, PHASES, watched

import fastsm
import fastsm.core.generations
from fastsm import Answer, Entry, FastStateMachine, LogId, MemoryStateMachine
from support.histories import History, state_of
from support.inside import inside

CLIENTS = 100
LEASES = 30
PROGRESS = struct.Struct("<BI")  # the phase, and how many chunks were applied


class Setting(NamedTuple):
    """The options of the process."""

    sync: str = "flush"
    stores: bool = True
    tables: bool = False  # saved, however small the state is
    fault: str = ""  # the name of a planted fault


SETTINGS = {
    "frames stored through the mapping": Setting(),
    "frames written with pwrite": Setting(stores=False),
    "a sync for each chunk": Setting(sync="apply"),
    "saved tables": Setting(tables=True),
}


@fastsm.procedure
def deposit(tx: Any, payload: bytes) -> list[int]:
    """Add one to the total and to an account."""
    return [tx.add(b"total", 1), tx.add(payload, 1)]


# ---- the process that is killed ----------------------------------------------------------------------------

def run(directory: str, given: str, told: str, phases: str, setting: Setting) -> None:
    """Apply the chunks in the file `given`, append results to the file `told`, and wait to be killed."""
    with open(phases, "r+b") as file:
        memory = mmap.mmap(file.fileno(), PROGRESS.size)
    current, done = ["starting"], [0]

    def phase(name: str) -> str:
        before, current[0] = current[0], name
        PROGRESS.pack_into(memory, 0, PHASES.index(name), done[0])
        return before

    if setting.tables:
        fastsm.core.generations.SAVE_TABLE_ABOVE = 0
    answers = os.open(told, os.O_WRONLY | os.O_APPEND)
    phase("opening")
    machine = FastStateMachine(
        directory, sync=setting.sync, procedures=[deposit], retain_entries=50, auto_compact=False,
        _files=watched(phase, setting.stores))
    phase("between")
    chunks = marshal.loads(Path(given).read_bytes())
    dice = random.Random(len(chunks))
    for chunk, job in chunks:
        done[0] += 1
        phase("applying")
        results = machine.apply([with_fault(entry, setting.fault) for entry in chunk])
        phase("between")
        if setting.fault == "mistakes":
            results = results[1:] + results[:1]
        os.write(answers, pickle.dumps([(entry[0], result) for entry, result in zip(chunk, results, strict=True)]))
        if job == "flush":
            machine.flush()
        elif job:
            phase(job)
            machine.compact(dice.randint(machine.stats().base.index, machine.last_applied().index))
            phase("between")
    while True:
        time.sleep(1)


def with_fault(entry: tuple[int, int, bytes], fault: str) -> tuple[int, int, bytes]:
    """Return the entry with a planted fault: without its session, or with a command that does nothing."""
    index, term, command = entry
    said: Any = fastsm.decode(command)
    if fault == "forgets" and isinstance(said, fastsm.types.Once):
        return index, term, command[32:]
    if fault == "loses" and isinstance(said, fastsm.types.Once):
        return index, term, fastsm.noop()
    return entry


# ---- the service -------------------------------------------------------------------------------------------

class Client:
    """A client that makes one deposit after the other, each until it has an answer."""

    def __init__(self, number: int) -> None:
        self.account = b"account %d" % number
        self.session = 0
        self.sequence = 1
        self.asked = 0  # how often its command was proposed
        self.proposed: list[int] = []  # the entries that hold its command

    def command(self) -> bytes:
        adds = [fastsm.add(b"total", 1), fastsm.add(self.account, 1)]
        inner = (fastsm.batch(adds), fastsm.transaction([], adds), fastsm.call("deposit", self.account))
        return fastsm.once(self.session, self.sequence, inner[self.sequence % 3])


class Service:
    """A directory, the log that is committed for it, and its clients."""

    def __init__(self, path: Path, seed: int, setting: Setting) -> None:
        self.path, self.setting, self.seed = path, setting, seed
        self.dice = random.Random(seed)
        self.history = History(seed, large=False)
        self.model = MemoryStateMachine(procedures=[deposit])
        self.log: list[Entry] = []  # the entries after the model's last one
        self.results: dict[int, Any] = {}  # the model's, for each entry
        self.clients = [Client(number) for number in range(CLIENTS)]
        self.now = 1
        self.counts: Counter[str] = Counter()

    # ---- a life --------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Run the process once, until it is killed; raise `AssertionError` if something is wrong."""
        if not self.clients[0].session:
            self.append(*[fastsm.open_session()] * CLIENTS)
            for client, answer in zip(self.clients, self.apply_all().values(), strict=True):
                client.session = answer.value
        self.invent()
        told = self.run_and_kill()
        recovered = self.judge(told)
        self.lose_some(recovered)
        self.tell(told)

    def end(self) -> None:
        """Answer all clients, without a kill; check that every deposit was made once."""
        for client in self.clients:
            if client.proposed:
                self.propose(client)
        self.tell(self.apply_all())
        values = [int(self.model.get(client.account) or 0) for client in self.clients]
        done = [client.sequence - 1 for client in self.clients]
        self.counts["applied twice"] += sum(max(0, value - each) for value, each in zip(values, done, strict=True))
        self.counts["lost"] += sum(max(0, each - value) for value, each in zip(values, done, strict=True))
        assert values == done
        assert int(self.model.get(b"total") or 0) == sum(done)

    def apply_all(self) -> dict[int, Any]:
        """Apply the log without a kill; return the results."""
        with self.opened() as machine:
            results = machine.apply(self.log)
            self.judge_state(machine)
        told = {entry.index: result for entry, result in zip(self.log, results, strict=True)}
        self.log = []
        return told

    def propose(self, client: Client) -> None:
        self.counts["asked again"] += client.asked > 0
        client.asked += 1
        self.append(client.command())
        client.proposed.append(self.log[-1].index)

    def append(self, *commands: bytes) -> None:
        for command in commands:
            index, term = self.log[-1][:2] if self.log else self.model.last_applied()
            self.log.append(Entry(index + 1, max(1, term + (self.dice.random() < 0.02)), command))

    def invent(self) -> None:
        """Append the entries of the next life."""
        dice = self.dice
        waiting = [client for client in self.clients for _ in range(dice.choice((1, 1, 2, 3)))]
        dice.shuffle(waiting)
        for client in waiting:
            self.propose(client)
            for _ in range(dice.choice((0, 0, 1, 2))):
                self.append(self.other())

    def other(self) -> bytes:
        """Return a command to put between deposits; most of them are about time."""
        dice, lease = self.dice, b"lease %d" % self.dice.randrange(LEASES)
        way = dice.random()
        if way < 0.25:
            return fastsm.put(lease, b"held", expires=self.now + dice.randrange(60))
        if way < 0.4:
            return fastsm.touch(lease, dice.choice((None, self.now + dice.randrange(90))))
        if way < 0.55:
            self.now += dice.choice((0, 1, 10))
            return fastsm.tick(self.now, limit=dice.choice((None, None, 2)))
        if way < 0.65:
            return fastsm.open_session(expires=self.now + dice.randrange(40))
        self.history.last = LogId(self.log[-1].index + 1, 1)
        return self.history.command()

    def chunks(self) -> list[tuple[list[tuple[int, int, bytes]], str]]:
        found, rest, dice = [], [tuple(entry) for entry in self.log], self.dice
        while rest:
            size = dice.choice((1, 1, 2, 3, 8))
            found.append((rest[:size], dice.choice(("flush", "", "", "compacting" if dice.random() < 0.2 else ""))))
            del rest[:size]
        return found

    def run_and_kill(self) -> dict[int, Any]:
        """Start the process and kill it at a random chunk, mostly in a certain phase; return what it acknowledged."""
        given, told, phases = (self.path.with_suffix(f".{name}") for name in ("given", "told", "phase"))
        chunks = self.chunks()
        given.write_bytes(marshal.dumps(chunks))
        told.write_bytes(b"")
        phases.write_bytes(bytes(PROGRESS.size))
        arguments = [self.path, given, told, phases, *map(repr, self.setting)]
        with (
            subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stderr=subprocess.PIPE) as child,
            phases.open("r+b") as file, mmap.mmap(file.fileno(), PROGRESS.size) as memory,
        ):
            try:
                self.wait_for_moment(memory, child, len(chunks))
            finally:
                child.kill()
            _, errors = child.communicate()
            assert child.returncode == -9, errors.decode()
            self.counts[f"killed while {PHASES[memory[0]]}"] += 1
        self.counts["kills"] += 1
        found: dict[int, Any] = {}
        with told.open("rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):  # the last one may be torn
            while True:
                found |= pickle.load(file)
        return found

    def wait_for_moment(self, memory: mmap.mmap, child: subprocess.Popen[bytes], chunks: int) -> None:
        dice = self.dice
        wanted = dice.randrange(chunks)
        phase = PHASES.index(dice.choice(("applying", "writing", "syncing", "between", *JOBS[1:2] * 2)))
        stop = time.monotonic() + 60
        while PROGRESS.unpack_from(memory)[1] < wanted and child.poll() is None and time.monotonic() < stop:
            time.sleep(0.0001)
        stop = time.monotonic() + 0.02
        while memory[0] != phase and time.monotonic() < stop:
            pass

    # ---- what must be true -------------------------------------------------------------------------------------

    def opened(self) -> FastStateMachine:
        return FastStateMachine(self.path, procedures=[deposit], retain_entries=50, auto_compact=False)

    def judge(self, told: dict[int, Any]) -> int:
        """Check the recovered state and acknowledged results against the model; return the last entry's index."""
        with self.opened() as machine:
            inside(machine).check()
            assert machine.last_applied().index >= max(told, default=0), "an acknowledged entry is lost"
            self.judge_state(machine)
        for index, result in told.items():
            self.counts["acknowledged"] += 1
            assert repr(result) == repr(self.results[index]), f"entry {index}: {result}, not {self.results[index]}"
        return self.model.last_applied().index

    def judge_state(self, machine: FastStateMachine) -> None:
        """Apply entries to the model up to the machine's last one, and check that both are equal."""
        count = machine.last_applied().index - self.model.last_applied().index
        entries = self.log[:count]
        for entry, result in zip(entries, self.model.apply(entries), strict=True):
            self.results[entry.index] = result
        assert self.model.last_applied() == machine.last_applied()
        assert state_of(machine) == state_of(self.model)
        assert list(machine.items()) == self.model.items()
        assert machine.state_checksum() == self.model.state_checksum()

    def lose_some(self, recovered: int) -> None:
        """Drop a part of the entries that were not applied, as if they were never committed."""
        left = [entry for entry in self.log if entry.index > recovered]
        self.log = left[: self.dice.randrange(len(left) + 1)]
        self.counts["never committed"] += len(left) - len(self.log)
        last = recovered + len(self.log)
        for client in self.clients:
            client.proposed = [index for index in client.proposed if index <= last]

    def tell(self, told: dict[int, Any]) -> None:
        """Let clients with an answer continue with the next deposit; the others will ask again."""
        for client in self.clients:
            known = [told[index] for index in client.proposed if index in told]
            if known:
                assert all(type(each) is Answer and each.ok for each in known), known
                assert {each.value[1] for each in known} == {client.sequence}, "a deposit counted twice, or was lost"
                client.sequence += 1
                client.proposed, client.asked = [], 0
                self.counts["commands"] += 1


def report(counts: Counter[str]) -> str:
    """Return the counts in one line."""
    return (
        f"{counts['kills']} kills, {counts['commands']} commands, {counts['asked again']} asked again, "
        f"{counts['never committed']} entries never committed, {counts['applied twice']} applied twice, "
        f"{counts['lost']} lost")


if __name__ == "__main__":
    import ast

    run(*sys.argv[1:5], Setting(*map(ast.literal_eval, sys.argv[5:])))
