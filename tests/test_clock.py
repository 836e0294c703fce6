"""``fastsm.Clock``: when it proposes a tick, and when it refuses to."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import pytest

import fastsm
from fastsm import Answer, Clock, ClockJumpError, MemoryStateMachine

NOW = 1_800_000_000_000  # some time in 2027
MINUTE, DAY = 60_000, 86_400_000


class Host:
    """A leader with a clock of its own; the test decides when its proposals are applied."""

    def __init__(self, machine: MemoryStateMachine | None = None, **options: int | None) -> None:
        self.now = NOW
        self.machine = machine or MemoryStateMachine()
        self.clock = Clock(self.machine, now=lambda: self.now, **options)  # type: ignore[arg-type]

    def apply(self, *commands: bytes) -> list[object]:
        first = self.machine.last_applied().index + 1
        return list(self.machine.apply([(first + i, 1, command) for i, command in enumerate(commands)]))

    def lease(self, key: bytes, milliseconds: int) -> None:
        self.apply(fastsm.put(key, b"", expires=self.now + milliseconds))

    def tick(self) -> object:
        """Poll, and apply the tick; return its result, or None without a tick."""
        command = self.clock.poll()
        return None if command is None else self.apply(command)[0]


def test_without_a_deadline_there_is_no_tick() -> None:
    """Keys and sessions without a deadline cost no tick, however much time passes."""
    host = Host()
    host.apply(fastsm.put(b"k", b""), fastsm.open_session())
    for _ in range(5):
        assert host.clock.poll() is None
        host.now += DAY
    assert host.machine.clock() == 0


def test_due_keys_are_removed_by_the_next_tick() -> None:
    """A key and then a session are removed by a tick at their deadlines, and no tick is proposed before that."""
    host = Host(idle_ms=DAY)
    host.apply(fastsm.tick(NOW))
    host.lease(b"k", 1_500)
    host.apply(fastsm.open_session(expires=NOW + 5_000))
    assert host.tick() is None
    host.now += 1_499
    assert host.tick() is None
    host.now += 1
    assert host.tick() == Answer(True, 1)
    assert host.machine.get(b"k") is None
    assert host.machine.clock() == host.now
    host.now += 3_500
    assert host.tick() == Answer(True, 1)
    assert host.machine.next_deadline() is None


def test_one_tick_an_interval() -> None:
    """A tick that was not applied is proposed again after the interval, and not earlier."""
    host = Host(interval_ms=100)
    host.lease(b"k", 0)
    assert host.clock.poll() == fastsm.tick(NOW, limit=10_000)
    for _ in range(99):
        host.now += 1
        assert host.clock.poll() is None
    host.now += 1
    assert host.clock.poll() == fastsm.tick(NOW + 100, limit=10_000)


def test_a_backlog_does_not_wait_for_the_interval() -> None:
    """While ticks reach their limit and leave keys that are due, the next one follows in 50 ms."""
    host = Host(limit=10)
    for number in range(35):
        host.lease(b"%d" % number, 0)
    removed = []
    while (left := host.machine.len()) > 0:
        removed.append(host.tick())
        assert host.machine.len() < left
        assert host.clock.delay() == (0.05 if host.machine.len() else 1)
        host.now += round(host.clock.delay() * 1_000)
    assert removed == [Answer(True, 10)] * 3 + [Answer(True, 5)]
    assert host.now == NOW + 150 + 1_000


@pytest.mark.parametrize("known", [0, NOW - 5 * MINUTE])
def test_a_leap_is_refused(known: int) -> None:
    """The error reports the times; nothing is proposed, and ticks continue as soon as the time is right."""
    host = Host(max_jump_ms=DAY)
    host.apply(fastsm.tick(known))
    host.lease(b"k", 0)
    host.now += DAY
    assert host.clock.poll() is not None
    host.now += 1_000
    for _ in range(2):
        with pytest.raises(ClockJumpError, match="expected at most 86400000") as raised:
            host.clock.poll()
    assert isinstance(raised.value, fastsm.FastsmError)
    found = (raised.value.now, raised.value.clock, raised.value.deadline, raised.value.max_jump_ms)
    assert found == (NOW + DAY + 1_000, known, NOW, DAY)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert host.machine.clock() == known
    host.now = NOW + 1
    assert host.tick() == Answer(True, 1)


def test_a_leap_may_be_allowed() -> None:
    """A leap is allowed by ``max_jump_ms=None``, or once by a tick that the operator proposes."""
    for options in ({"max_jump_ms": None}, {"max_jump_ms": 1}):
        host = Host(**options)
        host.lease(b"k", 0)
        host.now += 400 * DAY
        if options["max_jump_ms"]:
            host.apply(fastsm.tick(host.now, limit=0))
        assert host.tick() == Answer(True, 1)


def test_after_a_quiet_year_no_leap_is_seen() -> None:
    """After a year without deadlines, the first one that is due makes the year plausible."""
    host = Host()
    host.lease(b"old", 0)
    assert host.tick() == Answer(True, 1)
    host.now += 365 * DAY
    host.lease(b"k", 1_000)
    assert host.tick() is None
    host.now += 1_000
    assert host.tick() == Answer(True, 1)
    assert host.machine.clock() == host.now


def test_a_deadline_that_is_long_over_does_not_hold_up_a_clock_that_was_followed() -> None:
    """A host that polled through a year without deadlines knows that its clock did not leap, whatever comes first."""
    host = Host()
    host.apply(fastsm.tick(NOW))
    for _ in range(365):
        host.now += DAY
        assert host.clock.poll() is None
    host.lease(b"k", -400 * DAY)
    assert host.tick() == Answer(True, 1)
    assert host.machine.clock() == host.now
    restarted = Host(host.machine)
    restarted.now = host.now + 2 * DAY
    assert restarted.clock.poll() is None
    restarted.lease(b"k", -400 * DAY)
    with pytest.raises(ClockJumpError):  # this host did not see the time pass
        restarted.clock.poll()


def test_a_far_deadline_is_no_reason_to_leap() -> None:
    """While nothing is due, a leap of the clock proposes nothing and raises nothing."""
    host = Host()
    host.apply(fastsm.tick(NOW))
    host.lease(b"k", 9_000 * DAY)
    host.now += 8_000 * DAY
    assert host.clock.poll() is None
    host.now = NOW + MINUTE
    assert host.tick() == Answer(True, 0)


def test_a_leader_whose_clock_is_late_does_no_harm() -> None:
    """The clock does not go back, no useless tick is proposed, and keys that are due by the clock are removed."""
    ahead = Host()
    ahead.lease(b"a", 0)
    assert ahead.tick() == Answer(True, 1)
    late = Host(ahead.machine)
    late.now -= 10 * MINUTE
    late.lease(b"due", 10 * MINUTE)
    late.lease(b"k", 11 * MINUTE)
    assert late.tick() == Answer(True, 1)
    assert [key for key, _ in late.machine.items()] == [b"k"]
    for _ in range(100):
        late.now += 1_000
        assert late.machine.clock() == NOW
        assert late.tick() is None
    late.now = NOW + MINUTE
    assert late.tick() == Answer(True, 1)


def test_a_clock_that_is_set_back_ends_the_pause() -> None:
    """If the host's own clock goes back by an hour, the next tick does not wait for that hour."""
    host = Host()
    host.lease(b"k", 0)
    assert host.clock.poll() is not None
    host.now -= 60 * MINUTE
    host.apply(fastsm.tick(NOW, limit=0))
    assert host.tick() == Answer(True, 1)
    assert host.machine.clock() == NOW


def test_the_clock_moves_while_something_has_a_deadline() -> None:
    """The clock moves every ``idle_ms``, so that procedures which read it get about the right time."""
    host = Host(idle_ms=10_000)
    host.lease(b"k", DAY)
    moved = []
    for _ in range(60):
        if host.tick() is not None:
            moved.append(host.machine.clock() - NOW)
        host.now += 1_000
    assert moved == [0, 10_000, 20_000, 30_000, 40_000, 50_000]


def test_delay_is_the_time_until_the_next_poll() -> None:
    """The delay is the rest of the interval, and never more than the interval, whatever the host's clock did."""
    host = Host(interval_ms=2_000)
    assert host.clock.delay() == 2
    host.lease(b"k", 0)
    assert host.clock.poll() is not None
    host.now += 1_500
    assert host.clock.delay() == 0.5
    host.now -= DAY
    assert host.clock.delay() == 2


@pytest.mark.parametrize(
    "option", ["interval_ms", "limit", "max_jump_ms", "idle_ms"])
def test_options_are_one_or_more(option: str) -> None:
    """The ``ValueError`` of an option below one names it; a float is a ``TypeError``."""
    with pytest.raises(ValueError, match=f"{option}=0"):
        Host(**{option: 0})
    with pytest.raises(TypeError):
        Host(**{option: 1.5})  # type: ignore[arg-type]


def test_a_stopped_machine_has_no_time() -> None:
    """Calls of the clock raise ``NotRunningError`` while the machine is stopped."""
    host = Host()
    host.machine.stop()
    for call in (host.clock.poll, host.clock.delay):
        with pytest.raises(fastsm.NotRunningError):
            call()


def test_the_default_clock_is_the_hosts() -> None:
    """A tick has the time of the host's clock, in milliseconds since 1970."""
    machine = MemoryStateMachine()
    clock: Callable[[], bytes | None] = Clock(machine).poll
    machine.apply([(1, 1, fastsm.put(b"k", b"", expires=4 * 10**12))])
    command = clock()
    assert command is not None
    tick = fastsm.decode(command)
    assert isinstance(tick, fastsm.types.Tick)
    assert 1_700_000_000_000 < tick.now < 4 * 10**12


@pytest.mark.parametrize("seed", range(20))
def test_leaders_with_clocks_apart_by_minutes(seed: int) -> None:
    """The clock never goes back, keys are removed when it reaches their deadlines, and no tick is useless."""
    dice = random.Random(seed)
    machine = MemoryStateMachine()
    hosts = [Host(machine, idle_ms=100 * DAY, limit=dice.choice((1, 3, 100))) for _ in range(3)]
    offsets = [0, dice.randrange(-5, 5) * MINUTE, dice.randrange(-5, 5) * MINUTE]
    leader, deadlines = hosts[0], dict[bytes, int]()
    leader.apply(fastsm.tick(NOW - 10 * MINUTE))
    for step in range(400):
        for host, offset in zip(hosts, offsets, strict=True):
            host.now = NOW + offset + step * 500
        if dice.random() < 0.05:
            leader = dice.choice(hosts)
        if step < 200 and dice.random() < 0.2:
            key = b"%d" % dice.randrange(10)
            deadlines[key] = leader.now + dice.randrange(20_000)
            leader.apply(fastsm.put(key, b"", expires=deadlines[key]))
        before = machine.clock()
        command = leader.clock.poll()
        if command is not None and dice.random() < 0.8:  # otherwise the proposal is lost
            answer = leader.apply(command)[0]
            assert isinstance(answer, Answer)
            assert answer.value > 0
        assert machine.clock() >= before
        assert all(machine.get(key) is not None or expires <= machine.clock() for key, expires in deadlines.items())
    leader = max(hosts, key=lambda host: host.now)
    while leader.machine.len():
        leader.now += 1_000
        leader.tick()
    assert machine.next_deadline() is None
