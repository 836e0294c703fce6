"""Power losses, kills, flipped bits and failing calls, for as long as you like: ``python -m tests.soak --minutes 60``.

Six families of faults share the time. Each round has a seed of its own, counted from ``--seed``. The first round with
a violation ends the run with status 1 and instructions to reproduce it.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from generation import test_kill

from fastsm import CorruptionError, FastsmError, FastStateMachine, FormatVersionError
from support import at_each_call, killed_clients, shim
from support.faulty import memory_directory
from support.histories import History, state_of
from support.power import QuietDirectory
from support.simulation import Simulation, kill

LIVES = 5  # lives of a directory, each ended by a kill
FLIPS = 3_000  # flipped bits of a round
MAJOR = (
    "states", "with holes", "torn within a page", "names lost", "lives", "failed syncs", "processes killed",
    "killed at a call", "calls and limits", "bits flipped", "kills", "commands", "asked again", "applied twice", "lost",
)  # fmt: skip


def kill_processes(seed: int, root: Path, counts: Counter[str]) -> list[str]:
    """Run a few lives of one directory, each ended by kill -9, and check each."""
    dice = random.Random(f"soak {seed}")
    name = dice.choice(sorted(test_kill.SETTINGS))
    setting = test_kill.SETTINGS[name]
    last = None
    for life in range(LIVES):
        killed = test_kill.run_and_kill(root / "killed", seed, setting, dice)
        counts["processes killed"] += 1
        counts[f"killed while {killed.phase}"] += 1
        if last and not killed.opened:  # it changed nothing, so the earlier knowledge still holds
            killed = last._replace(phase=killed.phase)
        last = killed
        try:
            test_kill.assert_right(root / "killed", seed, setting, killed)
        except (AssertionError, FastsmError) as error:
            return [f"kill -9, seed {seed}, {name}, life {life}, {killed}: {error!r}"]
    return []


def kill_under_clients(seed: int, root: Path, counts: Counter[str]) -> list[str]:
    """Run a few lives of one directory with clients, sessions and leases, then check that each deposit counts once."""
    name = random.Random(f"clients {seed}").choice(sorted(killed_clients.SETTINGS))
    service = killed_clients.Service(root / "clients", seed, killed_clients.SETTINGS[name])
    try:
        for _ in range(LIVES):
            service.live()
        service.end()
    except (AssertionError, FastsmError) as error:
        return [f"clients, seed {seed}, {name}, {killed_clients.report(service.counts)}: {error!r}"]
    finally:
        counts.update(service.counts)
    return []


def lose_power(seed: int, root: Path, counts: Counter[str]) -> list[str]:
    """Run one story of the simulator of power losses."""
    simulation = Simulation(seed, root).run()
    counts += simulation.counts
    return simulation.violations


def strike_calls(seed: int, faults: Iterable[str], counts: Counter[str]) -> list[str]:
    """Run some scenes, with a fault at each of their calls in turn."""
    dice = random.Random(f"calls {seed}")
    fault, scenes = dice.choice(sorted(faults)), dice.sample(sorted(at_each_call.ALL), 4)
    found = shim.run_with(library(), Path(at_each_call.__file__), fault, *scenes)
    for ended in found["outcomes"].values():
        for outcome, count in ended.items():
            counts["killed at a call" if outcome == "killed" else "calls and limits"] += count
    return found["violations"]


@functools.cache
def library() -> Path:
    """Return the path of the library that makes calls fail."""
    return shim.compiled(Path(tempfile.mkdtemp()))


def flip_bits(seed: int, root: Path, counts: Counter[str]) -> list[str]:
    """Flip random bits of a closed state with a base; each gives an error that names the file, or the full state."""
    dice = random.Random(f"flips {seed}")
    path, history = root / "flipped", History(seed, large=False)
    with FastStateMachine(path, retain_entries=20, _files=QuietDirectory) as machine:
        for _ in range(dice.randrange(2, 30)):
            machine.apply(history.chunk())
        machine.compact()
        machine.apply(history.chunk())
        state = state_of(machine)
    files = {file: file.read_bytes() for file in sorted(path.iterdir()) if file.name not in ("LOCK", "PUBLISHED")}
    for _ in range(FLIPS):
        file = dice.choice(list(files))
        bit = dice.randrange(8 * len(files[file]))
        damaged = bytearray(files[file])
        damaged[bit >> 3] ^= 1 << (bit & 7)
        file.write_bytes(damaged)
        counts["bits flipped"] += 1
        try:
            machine = FastStateMachine(path, verify_on_open="full", _files=QuietDirectory)
        except (CorruptionError, FormatVersionError) as error:
            named = error.path == str(file)
        else:
            named = state_of(machine) == state
            kill(machine)
        if not named:
            return [f"bit {bit} of {file.name} was not noticed, or another file named"]
        file.write_bytes(files[file])
    return []


KILLS = [name for name, fault in at_each_call.FAULTS.items() if fault.kills]

# Each family, with its share of the time.
FAMILIES: dict[str, tuple[float, Callable[[int, Path, Counter[str]], list[str]]]] = {
    "power": (0.5, lose_power),
    "flips": (0.12, flip_bits),
    "kills": (0.05, kill_processes),
    "clients": (0.05, kill_under_clients),
    "calls-killed": (0.2, lambda seed, root, counts: strike_calls(seed, KILLS, counts)),
    "calls-failed": (
        0.08, lambda seed, root, counts: strike_calls(seed, set(at_each_call.FAULTS) - set(KILLS), counts)
    ),
}  # fmt: skip


def show(counts: Counter[str]) -> None:
    for name, count in sorted(counts.items(), key=lambda item: (item[0] not in MAJOR, item[0])):
        print(f"{count:>12,}  {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, help="of the first round of each family; by default it depends on the time")
    parser.add_argument("--family", choices=FAMILIES, help="this one alone")
    parser.add_argument("--rounds", type=int, help="stop after so many rounds, if that is earlier")
    options = parser.parse_args()
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    first = int(time.time()) if options.seed is None else options.seed
    families = [options.family] if options.family else list(FAMILIES)
    started = told = time.monotonic()
    spent, rounds, counts = dict.fromkeys(families, 0.0), dict.fromkeys(families, 0), Counter[str]()
    status = 0
    print(f"fastsm soak: {options.minutes} minutes, from seed {first}, process {os.getpid()}", flush=True)
    try:
        while time.monotonic() - started < 60 * options.minutes and sum(rounds.values()) != options.rounds:
            family = min(families, key=lambda name: spent[name] / FAMILIES[name][0])
            seed = first + rounds[family]
            before = time.monotonic()
            with memory_directory() as root:
                violations = FAMILIES[family][1](seed, root, counts)
            spent[family] += time.monotonic() - before
            rounds[family] += 1
            if violations:
                print(f"VIOLATED (again: --family {family} --seed {seed} --rounds 1):")
                print("\n".join(violations))
                status = 1
                break
            if time.monotonic() - told > 10:
                told = time.monotonic()
                major = ", ".join(f"{counts[name]:,} {name}" for name in MAJOR)
                print(f"{told - started:7.0f} s: {major}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
        status = 130
    show(counts)
    print(f"{time.monotonic() - started:.0f} s, rounds from seed {first}: {rounds}; violations: {int(status == 1)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
