"""Files of several moments in one directory: files that fit together open, otherwise an error names the wrong file.

A directory may be partly restored, copied while it was in use, or put together from several copies. CURRENT, base, log
and table are taken from moments of one directory, of a copy of it that continued differently, and of another directory;
all combinations are opened.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fastsm
from fastsm import CorruptionError, FastStateMachine, LogId
from support.faulty import crash_copy, memory_directory
from support.inside import inside

KINDS = ("CURRENT", "base", "log", "table")


class Moment(NamedTuple):
    """The files of a directory at one time, and the state that they hold."""

    files: dict[str, tuple[str, bytes]]  # by kind: name and content
    last: LogId
    items: list[tuple[bytes, bytes]]
    life: tuple[str, ...]  # the log, and each stretch of its history since
    named: tuple[str, ...]  # as far as CURRENT says


def files_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return the files of the generation in use, by kind."""
    found = {}
    for file in path.iterdir():
        kind = file.name.partition("-")[0]
        if kind in KINDS:
            assert kind not in found
            found[kind] = (file.name, file.read_bytes())
    return found


def moment(path: Path, life: tuple[str, ...], named: tuple[str, ...]) -> Moment:
    with memory_directory() as root, FastStateMachine(crash_copy(path, root / "copy"), contiguous=False) as machine:
        return Moment(files_of(path), machine.last_applied(), list(machine.items()), life, named)


def go_on(machine: FastStateMachine, word: bytes, count: int = 20) -> None:
    """Apply `count` chunks; words of equal length give equal sizes, so that two histories have equal offsets."""
    for _ in range(count):
        index = machine.last_applied().index + 1
        machine.apply([(index, 1, fastsm.put(b"key %d" % (index % 30), word + b" %06d" % index))])


def make_moments(root: Path) -> dict[str, Moment]:
    """Return moments: a first generation; a second one, closed, killed later, closed later; a copy; another state."""
    found = {}
    path = root / "state"
    with FastStateMachine(path, contiguous=False, retain_entries=5) as machine:
        go_on(machine, b"one")
    found["first generation"] = moment(path, ("log-1",), ("log-1",))
    with FastStateMachine(path, contiguous=False, retain_entries=5) as machine:
        machine.compact()
        go_on(machine, b"two")
    shutil.copytree(path, root / "copy")
    found["closed"] = moment(path, ("log-2", "two"), ("log-2", "two"))
    with FastStateMachine(path, contiguous=False, retain_entries=5) as machine:
        go_on(machine, b"red")
        machine.flush()
        go_on(machine, b"red")
        crash_copy(path, root / "killed")
    found["killed"] = moment(root / "killed", ("log-2", "two", "red"), ("log-2", "two"))
    found["closed later"] = moment(path, ("log-2", "two", "red", "end"), ("log-2", "two", "red", "end"))
    with FastStateMachine(root / "copy", contiguous=False, retain_entries=5) as machine:
        go_on(machine, b"tan")  # with frames of the same sizes
        machine.flush()
        go_on(machine, b"tan")
    found["a copy"] = moment(root / "copy", ("log-2", "two", "tan"), ("log-2", "two", "tan"))
    with FastStateMachine(root / "other", contiguous=False, retain_entries=5) as machine:
        go_on(machine, b"one")
        machine.compact()
        go_on(machine, b"two")
    found["another directory"] = moment(root / "other", ("other", "two"), ("other", "two"))
    return found


@pytest.fixture(scope="module")
def moments() -> Iterator[dict[str, Moment]]:
    with pytest.MonkeyPatch.context() as patch, memory_directory() as root:
        patch.setattr("fastsm.core.generations.SAVE_TABLE_ABOVE", 0)
        yield make_moments(root)


def expected(named: Moment, base: Moment, log: Moment) -> str:
    """Return the name of the file that does not fit, or "" if base and log are what CURRENT names, or later."""
    if named.life[0] == "log-1":
        return "" if log is named else "log-1"  # other logs have other names, so there is none
    if log.life[0] == "log-1":
        return "log-2"
    if log.life[0] != named.life[0]:
        return "log-2"
    if base.files.get("base") != log.files["base"]:
        return "base-2"
    return "" if log.life[: len(named.named)] == named.named else "log-2"


def put(directory: Path, chosen: tuple[Moment, ...]) -> None:
    directory.mkdir()
    for kind, source in zip(KINDS, chosen, strict=True):
        if kind in source.files:
            name, content = source.files[kind]
            (directory / name).write_bytes(content)


def test_all_mixes_of_files_open_as_what_they_say_or_name_what_does_not_belong(moments: dict[str, Moment]) -> None:
    """Any combination of files opens as the log's own state if it satisfies CURRENT; otherwise it is an error."""
    assert all("table" in each.files for each in moments.values())
    with memory_directory() as root:
        opened = 0
        for number, names in enumerate(itertools.product(moments, repeat=4)):
            chosen = tuple(moments[name] for name in names)
            directory = root / f"{number}"
            put(directory, chosen)
            wrong = expected(*chosen[:3])
            before = {file.name: file.read_bytes() for file in directory.iterdir()}
            for read_only in (True, False):
                if wrong:
                    with pytest.raises(CorruptionError) as caught:
                        FastStateMachine(directory, contiguous=False, verify_on_open="off", read_only=read_only)
                    assert caught.value.path == str(directory / wrong), f"{names}: {caught.value}"
                    files = [file for file in directory.iterdir() if file.name not in ("LOCK", "PUBLISHED")]
                    after = {file.name: file.read_bytes() for file in files}
                    assert after == before, names
                    continue
                with FastStateMachine(
                    directory, contiguous=False, verify_on_open="off", read_only=read_only
                ) as machine:
                    assert machine.last_applied() == chosen[2].last, names
                    assert list(machine.items()) == chosen[2].items, names
                    machine.verify()
                    inside(machine).check()
                    opened += 1
            shutil.rmtree(directory)
        assert opened > 2 * len(moments) ** 2


def test_a_table_of_other_bytes_is_never_used(moments: dict[str, Moment]) -> None:
    """A table is used only with the log that it was made from, or a later moment of that log."""
    with memory_directory() as root:
        for number, (of_log, of_table) in enumerate(itertools.product(moments.values(), repeat=2)):
            directory = root / f"{number}"
            put(directory, (of_log, of_log, of_log, of_table))
            known = of_table.named  # it was saved at the last close
            with FastStateMachine(directory, contiguous=False, verify_on_open="off", read_only=True) as machine:
                fits = of_log.life[: len(known)] == known and of_table.life[0] == of_log.life[0]
                assert inside(machine).index.loaded == fits
