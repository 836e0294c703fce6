"""A program that opens saved tables with false content and correct checksums, and must not crash.

It prints one line for each. ``python -m support.hostile_tables DIRECTORY SCRATCH``: the directory holds a base, a log
and a table of several segments.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fastsm
import fastsm.core.generations
from fastsm import FastsmError, FastStateMachine
from support.inside import inside
from support.tables import SEGMENT, TableFile, place_of

NUMBERS = (0, 1, 7, 2**31, 2**32 - 1, 2**36, 2**39 - 8, 2**63, 2**64 - 1)


def lies(table: TableFile) -> Iterator[tuple[str, Callable[[TableFile], object]]]:
    """Yield a name and a function for each way to falsify a table."""
    start, end = table.saved.log_start, table.saved.log_start + table.saved.log_offset
    for field in set(table.saved._fields) - {"sessions", "touches"}:
        for number in NUMBERS:
            yield f"{field} is {number}", lambda t, f=field, n=number: t.change(**{f: n})
    for place in (16, 160, 1_000, start - 65_536, start - 4_096, start - 16, start, start + 96, end - 16, end - 24):
        yield f"all slots lead to {place}", lambda t, p=place: t.move_all(p)
        yield f"one slot leads to {place}", lambda t, p=place: t.move(next(t.slots())[0], p)
    for seed in range(6):
        yield f"slots lead anywhere, {seed}", lambda t, s=seed: scatter(t, random.Random(s), end)
        yield f"slots lead into values, {seed}", lambda t, s=seed: shift(t, random.Random(s))
        yield f"numbers anywhere, {seed}", lambda t, s=seed: scribble(t, random.Random(s))
    for name in ("sessions", "touches"):
        for field in getattr(table.saved, name)._fields:
            for number in NUMBERS:
                yield f"{field} of {name} is {number}", lambda t, n=name, f=field, i=number: t.change_part(n, **{f: i})
    for place in (0, 7, 8, 16, start - 16, start, end - 32, end - 24, end - 16, 2**64 - 8):
        yield f"all deadlines lead to {place}", lambda t, p=place: lead_deadlines(t, p)
    yield "slots in disorder", disorder
    named = 1 << table.saved.depth
    yield "one segment for all", lambda t: t.set(f"{named}I", t.sections.directory, *[0] * named)
    for depth in range(table.saved.depth + 1):
        yield f"segments of depth {depth}", lambda t, d=depth: depths(t, d)
    yield "all is dead", lambda t: t.set(f"{t.saved.dead_words}Q", t.sections.dead, *[2**64 - 1] * t.saved.dead_words)
    yield "nothing is dead", lambda t: t.set(f"{t.saved.dead_words}Q", t.sections.dead, *[0] * t.saved.dead_words)
    yield "runs up to the last index", lambda t: t.set("QQQ", t.sections.runs, 1, 2**64 - 2, 2**64 - 2)
    yield "metadata of the last index", lambda t: t.set("QQ", t.sections.metadata, 2**64 - 1, 2**64 - 1)


def lies_on_order(table: TableFile) -> Iterator[tuple[str, Callable[[TableFile], object]]]:
    """Yield the falsifications of the order of keys; most keep the sum of the places, which is checked."""
    start, end = table.saved.log_start, table.saved.log_start + table.saved.log_offset
    for place in (0, 7, 8, 128, 136, start - 16, start, end - 24, end - 16, 2**63, 2**64 - 8):
        yield f"the whole order leads to {place}", lambda t, p=place: t.set_ordered([p] * t.saved.keys)
    for seed in range(4):
        yield f"the order leads anywhere, {seed}", lambda t, s=seed: mislead(t, random.Random(s), end)
        yield f"a shuffled order, {seed}", lambda t, s=seed: t.set_ordered(
            random.Random(s).sample(t.ordered(), t.saved.ordered))
    yield "a falling order", lambda t: t.set_ordered(t.ordered()[::-1])
    yield "one key all over", lambda t: t.set_ordered(balanced(t.ordered()))


def scatter(table: TableFile, dice: random.Random, end: int) -> None:
    for at, _ in list(table.slots()):
        table.move(at, dice.randrange(2, end // 8 - 1) * 8)


def shift(table: TableFile, dice: random.Random) -> None:
    for at, slot in list(table.slots()):
        table.move(at, place_of(slot) + 8 * dice.randrange(3))


def scribble(table: TableFile, dice: random.Random) -> None:
    for _ in range(dice.randrange(1, 9)):
        at = dice.choice((
            dice.randrange(table.sections.runs, table.sections.directory + 8),
            table.sections.segments + dice.randrange(SEGMENT),
        ))
        table.set("B", at, dice.randrange(256))


def lead_deadlines(table: TableFile, place: int) -> None:
    for number in range(table.saved.key_deadlines):
        table.set("Q", table.sections.deadlines + 16 * number + 8, place)


def disorder(table: TableFile) -> None:
    slots = list(table.slots())
    for (at, _), (_, slot) in zip(slots, slots[1:] + slots[:1], strict=True):
        table.set("Q", at, slot)


def mislead(table: TableFile, dice: random.Random, end: int) -> None:
    """Move places of the order in pairs, so that their sum stays the same."""
    places = table.ordered()
    for _ in range(len(places)):
        a, b = dice.sample(range(len(places)), 2)
        most = min(places[a] - 136, end - 24 - places[b])
        step = dice.randrange(most // 8 + 1) * 8 if most > 0 else 0
        places[a] -= step
        places[b] += step
    table.set_ordered(places)


def balanced(places: list[int]) -> list[int]:
    """Return places with the same sum that are almost all equal."""
    mean = sum(places) // len(places) & ~7
    return [mean] * (len(places) - 1) + [sum(places) - mean * (len(places) - 1)]


def depths(table: TableFile, depth: int) -> None:
    for segment in range(table.saved.segments):
        table.set("I", table.sections.segments + segment * SEGMENT + 8 * 4096 + 4, depth)


def use(path: Path, verify: str) -> str:
    """Open the directory and call everything; return how that ended."""
    tries: list[str] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except (FastsmError, MemoryError) as error:
            tries.append(type(error).__name__)

    try:
        machine = FastStateMachine(path, verify_on_open=verify)
    except FastsmError as error:
        return type(error).__name__
    keys = [b"%d" % i for i in range(9_000)]
    if not inside(machine).index.loaded:
        right = machine.get_many(keys) == [b"value " + key for key in keys[:7_000]] + [None] * 2_000
        machine.close()
        return "read" if right else "wrong"
    for call in (
        lambda: machine.get_many(keys), lambda: machine.get_columns(keys), lambda: [machine.get(key) for key in keys],
        lambda: [bytes(machine.get_view(key) or b"") for key in keys], lambda: [machine.modified(key) for key in keys],
        lambda: [key in machine for key in keys],
    ):
        attempt(call)
    for call in (
        lambda: list(machine.keys()), lambda: list(machine.items()), machine.columns, lambda: machine.scan_prefix(b"1"),
        lambda: machine.count(b"2"), lambda: list(machine.ordered(reverse=True)), lambda: machine.scan(b"3", limit=99),
        machine.membership, machine.stats, lambda: machine.entry_term(1), machine.snapshot_metadata,
        machine.next_deadline, lambda: [machine.deadline(key) for key in keys],
    ):
        attempt(call)
    index, term = machine.last_applied()
    for number, commands in enumerate((
        [fastsm.compare_and_swap(key, b"value " + key, b"swapped") for key in keys[::3]],
        [fastsm.put(key, b"new") for key in keys], [fastsm.delete(key) for key in keys[::2]],
        [fastsm.touch(key, 10**8) for key in keys[:3_000]], [fastsm.tick(10**12, limit=700), fastsm.tick(10**12)],
        [fastsm.put(b"more %d" % i, b"") for i in range(6_000)],
    )):
        first = index + 1 + 20_000 * number
        chunk = [(first + i, term, command) for i, command in enumerate(commands)]
        attempt(partial(machine.update_last_applied, (first - 1, term)))
        attempt(partial(machine.apply, chunk))
        attempt(lambda: list(machine.items()))
        attempt(lambda: machine.scan(limit=2_000))
        attempt(lambda: machine.count(b"4"))
    attempt(lambda: machine.write_snapshot(path / "snapshot", (index, term)))
    attempt(lambda: machine.compact(machine.last_applied()))
    attempt(machine.close)
    return f"believed {' '.join(sorted(set(tries)))}"


def main() -> None:
    """Falsify the table in every way, and open it each time."""
    source, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    fastsm.core.generations.SAVE_TABLE_ABOVE = 0
    with FastStateMachine(source) as machine:
        index, term = machine.last_applied()
        commands = [fastsm.touch(b"%d" % i, 10**9 + i) for i in range(2_000)]
        commands += [fastsm.open_session(expires=10**9 + i) for i in range(50)]
        machine.apply([(index + 1 + i, term, command) for i, command in enumerate(commands)])
    (name,) = [path.name for path in source.glob("table-*")]
    whole = TableFile(source / name)
    without_order = [(kind, tell, False) for kind, tell in lies(whole)]  # with it, its sum would give most of them away
    for number, (kind, tell, keep) in enumerate(
        without_order + [(kind, tell, True) for kind, tell in lies_on_order(whole)]
    ):
        path = scratch / str(number)
        shutil.copytree(source, path)
        table = TableFile(path / name)
        if not keep:
            table.set_ordered([])
        tell(table)
        table.write()
        print(f"{kind}:", end=" ", flush=True)
        print(use(path, ("off", "full", "background")[number % 3]), flush=True)
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
