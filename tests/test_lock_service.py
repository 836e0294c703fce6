"""The lock of ``examples/recipes`` on a cluster whose leaders are killed and whose clocks are minutes apart.

The cluster is simulated: one committed log, replicas of both kinds that apply it, and a leader that may be killed with
proposals in flight, which are then lost, or committed without an answer. Each replica and each client has a clock of
its own. The judge looks only at the log, entry by entry, on a machine of its own.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import Answer, Clock, Entry, FastStateMachine, MemoryStateMachine
from support.lock_holder import DATA, Holder
from support.recipes import recipe

lock = recipe("lock")
MINUTE = 60_000
NOW = 1_800_000_000_000
LEASE = 10_000
STEPS, SEEDS = 600, 5
KEY = lock.lock_key("disk")


class Unknown(Exception):
    """It is unknown whether the proposal was committed."""


class Replica:
    """One node: a machine of either kind, and a wrong clock."""

    def __init__(self, path: Path | None, offset: int) -> None:
        self.path = path
        self.offset = offset
        self.now = NOW
        self.open()

    def open(self) -> None:
        """Open the machine after a kill: with its stored state or, without a directory, empty."""
        if self.path is None:
            self.machine: Any = MemoryStateMachine(procedures=lock.PROCEDURES)
        else:
            self.machine = FastStateMachine(self.path, procedures=lock.PROCEDURES)
        self.clock = Clock(self.machine, interval_ms=500, now=lambda: self.now + self.offset)

    def follow(self, log: list[Entry], up_to: int) -> list[Any]:
        """Apply committed entries up to an index; return the results of new ones."""
        return list(self.machine.apply(log[self.machine.last_applied().index : up_to]))

    def close(self) -> None:
        if self.path is not None:
            self.machine.close()


class Cluster:
    """A committed log, its replicas, and which of them leads."""

    def __init__(self, tmp_path: Path, dice: random.Random) -> None:
        self.dice = dice
        self.log: list[Entry] = []
        self.now = NOW
        self.term = 1
        self.counts: Counter[str] = Counter()
        tmp_path.mkdir(exist_ok=True)
        places = [tmp_path / "0", None, tmp_path / "1"] if hasattr(FastStateMachine, "clock") else [None] * 3
        self.replicas = [Replica(path, dice.randrange(-5, 6) * MINUTE) for path in places]
        self.leader = self.replicas[0]

    def pass_time(self, milliseconds: int) -> None:
        self.now += milliseconds
        for replica in self.replicas:
            replica.now = self.now
        command = self.leader.clock.poll()
        if command is not None:
            self.counts["ticks"] += 1
            self.commit(command)
        for replica in self.replicas:
            if self.dice.random() < 0.3:
                replica.follow(self.log, self.dice.randint(replica.machine.last_applied().index, len(self.log)))

    def commit(self, command: bytes) -> Any:
        self.log.append(Entry(len(self.log) + 1, self.term, command))
        return self.leader.follow(self.log, len(self.log))[-1]

    def propose(self, command: bytes) -> Any:
        """Propose a command; the leader may be killed before or after the command is committed."""
        if self.dice.random() < 0.06:
            committed = self.dice.random() < 0.5
            if committed:
                self.log.append(Entry(len(self.log) + 1, self.term, command))
            self.counts["committed, and nobody was told" if committed else "lost"] += 1
            self.kill()
            raise Unknown
        return self.commit(command)

    def kill(self) -> None:
        """Kill the leader, which will come back later; another replica leads."""
        self.counts["kills"] += 1
        self.leader.close()
        self.leader.open()
        self.term += 1
        self.leader = self.dice.choice([replica for replica in self.replicas if replica is not self.leader])
        self.leader.follow(self.log, len(self.log))

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()


class Client(Holder):
    """A client that takes the lock, writes under it, and believes its own clock."""

    def __init__(self, cluster: Cluster, name: str, offset: int) -> None:
        super().__init__(LEASE)
        self.cluster, self.counts = cluster, cluster.counts
        self.offset = offset
        self.lock = lock.Lock(self.propose, "disk", name)
        self.asks_again = False

    def propose(self, command: bytes) -> Any:
        return self.cluster.propose(command)

    @property
    def now(self) -> int:
        return self.cluster.now + self.offset

    @property
    def believes(self) -> bool:
        return self.now < self.until

    def step(self) -> None:
        dice = self.cluster.dice
        try:
            if not self.believes:
                self.acquire(again=self.asks_again)
                self.asks_again = False
            elif dice.random() < 0.5:
                self.write()
            elif dice.random() < 0.6:
                self.keep_alive()
            elif dice.random() < 0.3:
                self.release()
        except Unknown:
            self.asks_again = not self.believes


def judge(log: list[Entry]) -> Counter[str]:
    """Check the log: which client holds the lock after each entry, and with which token each write came."""
    machine = MemoryStateMachine(procedures=lock.PROCEDURES)
    counts: Counter[str] = Counter()
    holder: tuple[bytes, int] | None = None
    newest = 0
    for entry in log:
        command = fastsm.decode(entry.command)
        result = machine.apply([entry])[0]
        owner, writer = machine.get(KEY), machine.modified(KEY)
        after = (owner, writer.index) if owner is not None and writer is not None else None
        if after != holder and after is not None:
            assert holder is None, f"entry {entry.index}: {after} took the lock of {holder}"
            assert after[1] > newest, f"entry {entry.index}: a token that does not rise"
            newest = after[1]
            counts["grants"] += 1
        if holder is not None and after is None:
            counts["ends by a tick" if isinstance(command, fastsm.types.Tick) else "ends by the holder"] += 1
        if (data := machine.modified(DATA)) is not None and data.index == entry.index:
            assert after is not None, f"entry {entry.index}: a write without a holder"
            assert machine.get(DATA) == b"%d" % after[1], f"entry {entry.index}: a write of one who lost the lock"
            counts["writes"] += 1
        assert isinstance(result, (bool, Answer))
        holder = after
    return counts


def play(path: Path, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Run a cluster with four clients for some simulated minutes; return the clients' counts and the judge's."""
    dice = random.Random(seed)
    cluster = Cluster(path, dice)
    clients: list[Client] = []
    while len(clients) < 4:
        try:
            clients.append(Client(cluster, f"client {len(clients)}", dice.randrange(-3, 4) * MINUTE))
        except Unknown:
            cluster.counts["sessions that nobody knows of"] += 1
    for _ in range(STEPS):
        cluster.pass_time(dice.randrange(1_000))
        dice.choice(clients).step()
        cluster.counts["two believe to hold it"] += sum(client.believes for client in clients) > 1
    states = set()
    for replica in cluster.replicas:
        replica.follow(cluster.log, len(cluster.log))
        states.add((replica.machine.clock(), tuple(replica.machine.items()), replica.machine.state_checksum()))
    assert len(states) == 1, "replicas differ"
    cluster.close()
    return cluster.counts, judge(cluster.log)


def test_never_two_holders(tmp_path: Path) -> None:
    """By the log's order the lock is only granted when it is free, tokens rise, and only its holder writes.

    Clients whose clocks are minutes apart believe at times that two of them hold it, which is why they need fencing.
    """
    happened, judged = Counter[str](), Counter[str]()
    for seed in range(SEEDS):
        counts, of_log = play(tmp_path / str(seed), seed)
        happened += counts
        judged += of_log
    print(dict(happened), dict(judged))
    wanted = ("kills", "lost", "committed, and nobody was told", "ticks", "two believe to hold it", "fenced off")
    assert min(happened[name] for name in wanted) > 10
    assert min(judged[name] for name in ("grants", "writes", "ends by a tick", "ends by the holder")) > 10


@pytest.mark.parametrize("fault", ["no condition", "clock of the proposer"])
def test_a_lock_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The judge finds a lock that writes without its token, and one that can be taken by a client's clock."""
    if fault == "no condition":
        monkeypatch.setattr(lock.Lock, "write", lambda self, *commands: bool(self._propose(fastsm.batch(commands))))
    else:
        def acquire(self: Any, lease_ms: int, *, now: int, again: bool = False) -> bool:
            return bool(self._propose(fastsm.put(KEY, self._owner.encode(), expires=now + lease_ms)))

        monkeypatch.setattr(lock.Lock, "acquire", acquire)
    with pytest.raises(AssertionError, match="entry"):
        play(tmp_path, 0)
