"""The recipes in ``examples/recipes`` run as their docstrings say, on both machines, and keep their promises."""

from __future__ import annotations

import doctest
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsm
from fastsm import FastStateMachine, MemoryStateMachine
from fastsm.testing import check_procedure
from support.recipes import RECIPES, recipe

NAMES = ["bank", "counter", "fifo_queue", "lock", "rate_limiter", "unique_ids"]
Machine = FastStateMachine | MemoryStateMachine

bank, counter, fifo_queue, lock, rate_limiter, unique_ids = map(recipe, NAMES)
PROCEDURES = [bank.transfer, *fifo_queue.PROCEDURES, *lock.PROCEDURES, rate_limiter.allow]


@pytest.fixture(params=["fast", "model"])
def machine(request: pytest.FixtureRequest, directory: Path) -> Iterator[Machine]:
    if request.param == "model":
        yield MemoryStateMachine(procedures=PROCEDURES)
    else:
        with FastStateMachine(directory, procedures=PROCEDURES, check_procedures=True) as fast:
            yield fast


@pytest.fixture
def propose(machine: Machine) -> Callable[[bytes], Any]:
    def apply(command: bytes) -> Any:
        return machine.apply([(machine.last_applied().index + 1, 1, command)])[0]

    return apply


def test_every_recipe_is_tested() -> None:
    """Every recipe is listed above, so that it is tested."""
    assert sorted(path.stem for path in RECIPES.glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_as_it_says(name: str) -> None:
    """Every `>>>` example in a recipe's docstring gives its output."""
    result = doctest.testmod(recipe(name), extraglobs={"fastsm": fastsm})
    assert result.attempted > 3
    assert result.failed == 0


def test_what_recipes_call_is_the_same_everywhere() -> None:
    """Each procedure of a recipe depends only on its payload and the state."""
    balances = {b"account/a": b"10", b"account/b": b"0"}
    transfers = [json.dumps(["a", "b", amount]).encode() for amount in (7, 7, 3)]
    assert [answer.ok for answer in check_procedure(bank.transfer, transfers, balances, processes=2)] == [
        True, False, True]
    jobs = [fastsm.put(fifo_queue.job_key("q", number), b"job") for number in range(150)]
    claims = [json.dumps(["q", "w", 10, 5]).encode()] * 3
    assert [answer.value[0] for answer in check_procedure(fifo_queue.claim, claims, jobs, processes=2)] == [0, 1, 2]


def test_the_counter_counts_once(machine: Machine, propose: Callable[[bytes], Any]) -> None:
    """If two clients repeat additions at random, the counter has the sum of the additions, each once."""
    dice = random.Random(1)
    clients = [counter.Counter(propose, b"n") for _ in range(2)]
    total = 0
    for number in range(1, 60):
        for client in clients:
            total += number
            for _ in range(dice.choice((1, 1, 2, 3))):
                client.add(number, number=number)
    assert clients[0].value(machine) == total
    propose(fastsm.put(b"n", b"no number"))
    with pytest.raises(ValueError, match="not a number"):
        clients[0].add(1, number=99)


def test_the_counter_never_takes_a_number_again(machine: Machine, propose: Callable[[bytes], Any]) -> None:
    """After an earlier number, which is stale, the next addition has a new one, so that it is counted."""
    client = counter.Counter(propose, b"n")
    assert (client.add(5, number=3), client.number) == (5, 3)
    with pytest.raises(ValueError, match="stale"):
        client.add(5, number=2)
    assert (client.add(1), client.number, client.value(machine)) == (6, 4, 6)


def test_ids_are_unique(propose: Callable[[bytes], Any]) -> None:
    """Ids are unique for any number of clients, some of them killed, and blocks of any size."""
    dice = random.Random(2)
    clients = [unique_ids.UniqueIds(propose, b"ids", block=dice.randrange(1, 9)) for _ in range(5)]
    drawn = []
    for _ in range(500):
        at = dice.randrange(len(clients))
        drawn.append(next(iter(clients[at])))
        if dice.random() < 0.02:
            clients[at] = unique_ids.UniqueIds(propose, b"ids", block=3)
    assert len(set(drawn)) == len(drawn)
    propose(fastsm.put(b"ids", b"no number"))
    with pytest.raises(ValueError, match="not a number"):
        next(unique_ids.UniqueIds(propose, b"ids"))
    for block in (0, -3):  # these would return no ids, or those of others
        with pytest.raises(ValueError, match="1 or more"):
            unique_ids.UniqueIds(propose, b"ids", block=block)


def test_no_money_is_made_or_lost(machine: Machine, propose: Callable[[bytes], Any]) -> None:
    """The sum of all accounts stays the same, and none is below zero, whatever is transferred or repeated."""
    dice = random.Random(3)
    names = ["a", "b", "c"]
    propose(fastsm.put_many([b"account/" + name.encode() for name in names], [b"100"] * 3))
    session, refused = propose(fastsm.open_session()).value, 0
    for number in range(1, 200):
        command = bank.transfer_command(*dice.sample(names, 2), dice.randrange(1, 90))
        answers = [propose(fastsm.once(session, number, command)) for _ in range(dice.choice((1, 2)))]
        assert answers[0] == answers[-1]
        refused += not answers[0]
        balances = [int(machine.get(b"account/" + name.encode()) or b"") for name in names]
        assert sum(balances) == 300
        assert min(balances) >= 0
    assert 0 < refused < 199
    with pytest.raises(ValueError, match="amount 0"):
        bank.transfer_command("a", "b", 0)
    for amount in (0, -50, "50", 0.5):
        assert not propose(fastsm.call("bank.transfer", json.dumps(["a", "b", amount]).encode())).ok
    assert [int(machine.get(b"account/" + name.encode()) or b"") for name in names] == balances


def test_the_limit_is_kept_in_every_window(propose: Callable[[bytes], Any]) -> None:
    """However requests and ticks are spread, no more than the limit are allowed before the window's end."""
    if not hasattr(FastStateMachine, "clock"):
        pytest.skip("FastStateMachine has no clock")
    dice = random.Random(4)
    now, ends, allowed = 1_000, 0, 0
    for _ in range(600):
        now += dice.randrange(60)
        if dice.random() < 0.2:
            propose(fastsm.tick(now))
            if now >= ends:
                allowed, ends = 0, 0
        if allowed == 0 and not ends:
            ends = now + 1_000
        answer = propose(rate_limiter.allow_command("ann", limit=5, window_ms=1_000, now=now))
        allowed += answer.ok
        assert answer.ok == (answer.value == 5 - allowed)
        assert allowed <= 5
        if not answer:
            assert answer.value == ends


def test_a_lock_that_was_never_acquired_allows_no_write(machine: Machine, propose: Callable[[bytes], Any]) -> None:
    """A client without a lease can neither write nor release, even if nobody else holds the lock."""
    if not hasattr(machine, "clock"):
        pytest.skip("it has no clock")
    holder, other = (lock.Lock(propose, "disk", name) for name in ("ann", "bob"))
    write = fastsm.put(b"disk/file", b"without the lock")
    assert not other.write(write)
    assert holder.acquire(10, now=0)
    assert not other.acquire(10, now=0)
    propose(fastsm.tick(10))
    assert (other.write(write), other.release(), other.keep_alive(10, now=10)) == (False, False, False)
    assert machine.get(b"disk/file") is None


@pytest.mark.parametrize("seed", range(3))
def test_jobs_are_done_in_order_and_none_is_lost(
    machine: Machine, propose: Callable[[bytes], Any], seed: int
) -> None:
    """If workers die at random, their jobs are claimed again after a tick; each job is acknowledged by one worker."""
    if not hasattr(machine, "clock"):
        pytest.skip("it has no clock")
    dice = random.Random(seed)
    now, pushed, claimed, done = 1_000, 0, dict[int, tuple[str, int]](), list[int]()
    for step in range(400):
        now += 10
        way = dice.random()
        if way < 0.3 and step < 250:
            propose(fifo_queue.push_command("q", b"%d" % pushed))
            pushed += 1
        elif way < 0.6:
            worker = f"worker {step}"
            answer = propose(fifo_queue.claim_command("q", worker, lease_ms=100, now=now))
            if answer:
                number = answer.value[0]
                assert number not in claimed or claimed[number][1] <= now - 100, "a job has two workers"
                claimed[number] = (worker, now)
        elif way < 0.8 and claimed:
            number = dice.choice(list(claimed))
            if propose(fifo_queue.acknowledge_command("q", claimed.pop(number)[0], number)):
                done.append(number)
        elif way < 0.85 and claimed:
            number = dice.choice(list(claimed))
            if propose(fifo_queue.keep_command("q", claimed[number][0], number, now + 100)):
                claimed[number] = (claimed[number][0], now)
        else:
            propose(fastsm.tick(now))
    assert len(set(done)) == len(done)
    left = [int(key[-20:]) for key, _ in machine.scan(prefix=b"queue/q/job/").entries]
    assert len(done) + len(left) == pushed
    propose(fastsm.tick(now + 1_000))
    again = [propose(fifo_queue.claim_command("q", "last", lease_ms=9, now=now)).value[0] for _ in left]
    assert again == left, "what is left is not claimed in the order in which it came"
    with pytest.raises(ValueError, match="slash"):
        fifo_queue.push_command("a/b", b"")
