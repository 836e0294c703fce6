"""Twenty-two bugs that such a library may have, each planted alone, which a named test of the suite must find.

Bugs about the disk are planted into the simulated disk. The others are planted into the source: a copy of the package
is built in which the environment switches one of them on, and a named test, run against that copy, must fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import fastsm
from support.faulty import memory_directory
from support.permits import cannot
from support.planted import ErrorSwallowed, NoSyncBeforeRename, SyncedOnceMore, TailNotCut
from support.power import NoDirectorySync, Platter
from support.simulation import Simulation

TESTS = Path(__file__).resolve().parent.parent
SOURCES = TESTS.parent / "fastsm"
SEEDS = range(14)  # those of test_power_loss.py

DISKS = {
    "no fsync of the directory": NoDirectorySync,
    "no fsync before the rename": NoSyncBeforeRename,
    "an fsync's error is ignored": ErrorSwallowed,
    "a failed fsync is tried again": SyncedOnceMore,
    "the tail is not cut by recovery": TailNotCut,
}


class Bug(NamedTuple):
    """A bug's places, as (file, right, wrong) with BUG for the switch, and the test that must find it."""

    places: tuple[tuple[str, str, str], ...]
    test: str


BUGS = {
    "recovery calls everything from the first bad frame on torn": Bug(
        (
            ("generation/recovery.pyx", "if self.end < self.watermark:", "if self.end < self.watermark and not BUG:"),
            ("disk/torn_tail.pyx", "    if tail.proof:\n", "    if tail.proof and not BUG:\n"),
        ),
        "generation/test_recovery.py::test_corruption_is_an_error_and_nothing_is_touched",
    ),
    "recovery calls every later valid frame a proof of corruption": Bug(
        (
            (
                "disk/torn_tail.pyx",
                "return search.end < watermark <= offset",
                "return (search.end < watermark or BUG) and watermark <= offset",
            ),
        ),
        "generation/test_recovery.py::test_torn_tail_is_cut",
    ),
    "the durable offset is recorded before the sync": Bug(
        (
            (
                "generation/framefile.pyx",
                "        started = time.perf_counter()\n        try:\n            if self.suspect_end:",
                "        if BUG:\n            self.durable = target\n"
                "        started = time.perf_counter()\n        try:\n            if self.suspect_end:",
            ),
        ),
        "core/test_flush.py::test_watermark_of_a_frame_written_during_a_sync_does_not_claim_that_sync",
    ),
    "the table is published before the frame": Bug(
        (
            (
                "core/engine.pyx",
                "        log.commit_frame(frame, length, runs.count)\n",
                "        if BUG:\n            self.publish(chunk)\n"
                "        log.commit_frame(frame, length, runs.count)\n",
            ),
        ),
        "core/test_flush.py::test_failed_write_leaves_the_state_as_it_was",
    ),
    "LOCK is unlinked on close": Bug(
        (
            (
                "disk/files.py",
                '        """Releases the lock and closes the directory. Idempotent."""\n',
                '        """Releases the lock and closes the directory. Idempotent."""\n'
                "        if BUG and self._lock is not None:\n            self.unlink(LOCK)\n",
            ),
        ),
        "machine/test_lock.py::test_lock_file_stays_after_close",
    ),
    "a length is not checked": Bug(
        (
            (
                "disk/format.pyx",
                "if length > available:",
                "if length > available and not BUG:",
            ),
        ),
        "disk/test_format.py::test_what_is_no_frame_is_torn_or_corrupt",
    ),
    "a new key is lost when many are merged into the order": Bug(
        (
            (
                "lookup/order.pyx",
                "        for i in range(count):\n            sorting.add(self.fresh[self.absorbed + i])",
                "        for i in range(BUG, count):\n            sorting.add(self.fresh[self.absorbed + i])",
            ),
        ),
        "lookup/test_order.py::test_new_keys_come_in_pieces_of_any_size",
    ),
    "a new key is lost when a few are inserted into the order": Bug(
        (
            (
                "lookup/order.pyx",
                "insert(&work, &self.root, <uint64_t *>items, sorted_places(items, count))",
                "insert(&work, &self.root, <uint64_t *>items, sorted_places(items, count) - (BUG and count > 1))",
            ),
        ),
        "lookup/test_order.py::test_new_keys_come_in_pieces_of_any_size",
    ),
    "the entry of a deleted key is believed": Bug(
        (
            (
                "lookup/ranges.pyx",
                "            if order.dead.is_dead(places[i]):",
                "            if order.dead.is_dead(places[i]) and not BUG:",
            ),
        ),
        "core/test_ordered.py::test_an_iterator_stays_at_its_moment",
    ),
    "an iterator is not told of what is overwritten": Bug(
        (
            (
                "lookup/order.pyx",
                "    if old >= moment.end or moment.lost:",
                "    if old >= moment.end or moment.lost or BUG:",
            ),
        ),
        "core/test_ordered.py::test_an_iterator_stays_at_its_moment",
    ),
    "the next generation takes over the order of the one before": Bug(
        (
            (
                "core/ordered.pyx",
                "            index.begin_order(mapping)\n            index.order.catch_up(tick)",
                "            index.begin_order(mapping)\n"
                "            if BUG and self._index.ordered:\n                index.order = self._index.order\n"
                "            index.order.catch_up(tick)",
            ),
        ),
        "core/test_ordered.py::test_a_random_history_with_everything_in_between",
    ),
    "a saved order of another generation is believed": Bug(
        (
            (
                "generation/saved_order.pyx",
                "and sum_of(places, count) == sum_of_table(index.table)",
                "and (BUG or sum_of(places, count) == sum_of_table(index.table))",
            ),
        ),
        "generation/test_saved_order.py::test_the_order_of_another_generation_is_not_believed",
    ),
    "keys that the log has after the saved order are not noted": Bug(
        (
            (
                "lookup/order.pyx",
                "        self.built = self.recording = self.loaded = True\n",
                "        self.built = self.recording = self.loaded = True\n"
                "        if BUG:\n            self.recording = False\n",
            ),
        ),
        "generation/test_saved_order.py::test_keys_after_the_table_are_noted",
    ),
    "a watch skips what a compaction carried over": Bug(
        (
            (
                "generation/changes.pyx",
                "        draft.frame = LOG_HEADER_SIZE\n",
                "        draft.frame = source.end if BUG else <uint64_t>LOG_HEADER_SIZE\n",
            ),
        ),
        "core/test_watch.py::test_compaction_moves_a_watch",
    ),
    "a change is told twice after an entry was split": Bug(
        (("generation/changes.pyx", "draft.left = draft.offset", "draft.left = 0 if BUG else draft.offset"),),
        "core/test_watch.py::test_it_goes_on_from_any_position",
    ),
    "a session is remembered before its command counts": Bug(
        (
            (
                "core/judging.pyx",
                "        last = number_at(found.value)\n        if sequence < last:",
                "        last = number_at(found.value)\n"
                "        if BUG and (number_at(numbers), sequence) in self.procedures:\n"
                "            return self.procedures[number_at(numbers), sequence]\n"
                "        if sequence < last:",
            ),
            (
                "core/judging.pyx",
                "        packed = pack_result(result)\n        if packed is None:",
                "        if BUG:\n            self.procedures[number_at(numbers), sequence] = result\n"
                "        packed = pack_result(result)\n        if packed is None:",
            ),
        ),
        "core/test_sessions.py::test_a_chunk_that_was_refused_is_not_remembered",
    ),
    "the header is outside of all checksums": Bug(
        (
            (
                "disk/format.pyx",
                "if load64(frame + FRAME_SEAL) != frame_seal(frame, identity, offset):",
                "if load64(frame + FRAME_SEAL) != frame_seal(frame, identity, offset) and not BUG:",
            ),
        ),
        "generation/test_recovery_bits.py::test_every_flipped_bit_leaves_a_right_prefix_after_an_unclean_end",
    ),
}


def test_there_are_twenty_two_planted_bugs() -> None:
    """There are twenty-two planted bugs."""
    assert len(DISKS) + len(BUGS) == 22


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("planted", DISKS.values(), ids=DISKS)
def test_a_bug_before_the_disk_is_seen(planted: type[Platter]) -> None:
    """The simulation of `test_power_loss.py` finds a violation on each disk with a planted bug."""
    with memory_directory() as root:
        assert any(Simulation(seed, root, planted, most_violations=1).run().violations for seed in SEEDS)


def plant(package: Path) -> list[str]:
    """Plant all bugs into the sources, each with a switch of its own; return the modules to compile."""
    changed = {}
    for number, bug in enumerate(BUGS.values(), 1):
        for name, right, wrong in bug.places:
            source = changed.setdefault(name, (SOURCES / name).read_text(encoding="utf-8"))
            assert right in source, f"{name} does not say {right!r} any more: plant this bug where it belongs now"
            changed[name] = source.replace(right, wrong.replace("BUG", f"(PLANTED == {number})"))
    for name, source in changed.items():
        compiled = name.endswith(".pyx")
        switch = 'int(__import__("os").environ.get("FASTSM_PLANTED", "0"))'
        before = "\ncdef " if compiled else "\nLOCK ="
        declared = f"\n{'cdef int ' * compiled}PLANTED = {switch}\n"
        (package / name).write_text(source.replace(before, declared + before, 1), encoding="utf-8")
    return [name.removesuffix(".pyx") for name in changed if name.endswith(".pyx")]


def build(package: Path, module: str) -> None:
    """Compile one module of the copy, as setup.py would."""
    suffix, include = sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include")
    cython = [sys.executable, "-m", "cython", "-3", "-X", "cdivision=True", "-X", "embedsignature=True", "-X",
              "binding=False", f"fastsm/{module}.pyx"]
    compiler = ["gcc", "-O0", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{include}", f"fastsm/{module}.c",
                "-o", f"fastsm/{module}{suffix}"]
    for command in (cython, compiler):
        ended = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def planted_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the folder of a copy of the package with all bugs, all switched off."""
    if not (SOURCES / "core" / "engine.pyx").exists():
        pytest.skip("the sources are out of the way: the installed package is tested")
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("a sanitizer is preloaded: the copy would be built without it")
    if shutil.which("gcc") is None:
        cannot("there is no gcc to compile the bugs with")
    pytest.importorskip("Cython")
    package = tmp_path_factory.mktemp("planted") / "fastsm"
    shutil.copytree(Path(fastsm.__file__).parent, package, ignore=shutil.ignore_patterns("*.c", "*.pyx", "__pycache__"))
    for declarations in SOURCES.rglob("*.pxd"):
        shutil.copy(declarations, package / declarations.relative_to(SOURCES))
    for module in plant(package):
        build(package, module)
    return package.parent


def run_tests(folder: Path, tests: Iterable[str], number: int) -> int:
    """Run tests against the copy; return 0, 1 if a test failed, or a negative number if the process crashed."""
    program = (
        "import sys, pytest, fastsm; assert fastsm.__file__.startswith(sys.argv[1]), fastsm.__file__; "
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    options = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", TESTS.parent, *(TESTS / test for test in tests)]
    return subprocess.run(
        [sys.executable, "-c", program, str(folder), *map(str, options)], cwd=folder, capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": str(folder), "FASTSM_PLANTED": str(number), "PYTHONDONTWRITEBYTECODE": "1"},
    ).returncode  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_the_source_is_seen(planted_package: Path, name: str) -> None:
    """The named test fails if the bug is switched on."""
    number = list(BUGS).index(name) + 1
    ended = run_tests(planted_package, [BUGS[name].test], number)
    assert ended == 1 or ended < 0, f"{BUGS[name].test} does not see that {name}: it ends with {ended}"


def test_without_a_bug_the_copy_is_right(planted_package: Path) -> None:
    """All the named tests pass if no bug is switched on, so that the failures above are due to the bugs."""
    assert run_tests(planted_package, sorted({bug.test for bug in BUGS.values()}), 0) == 0
