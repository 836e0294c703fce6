"""`Reader` where it is used: by other users, on read-only mounts, in containers, after forks, during signals."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from reading.test_reader import add, everything

from fastsm import CompactedError, FastStateMachine, NotRunningError, Reader, StorageError, put
from fastsm.disk import published
from fastsm.disk.files import Directory
from support.inside import inside
from support.permits import cannot, ext4, mounted, run


def test_where_stores_may_lack_a_block_it_is_written(tmp_path: Path) -> None:
    """On a copy-on-write file system, readers follow in the same way."""

    class Copying(Directory):
        def stores_are_safe(self, fd: Any) -> bool:
            return False

    with FastStateMachine(tmp_path, _files=Copying) as machine, Reader(tmp_path) as reader:
        for number in range(1, 20):
            add(machine, put(b"color", b"%d" % number))
            assert (reader.refresh().index, reader.get(b"color")) == (number, b"%d" % number)


def test_the_file_has_the_directory_s_mode(tmp_path: Path) -> None:
    """Another user's process can read if `mode` lets it."""
    with FastStateMachine(tmp_path / "state", mode=0o750):
        assert stat.S_IMODE(os.stat(tmp_path / "state" / published.NAME).st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_reads(tmp_path: Path) -> None:
    """A process with only the rights of `mode` follows; without them it gets a `StorageError`."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    for mode, expected in ((0o755, 0), (0o700, 13)):
        path = tmp_path / f"{mode:o}"
        with FastStateMachine(path, mode=mode) as machine:
            add(machine, put(b"color", b"blue"))
            child = os.fork()
            if child == 0:
                status = 99
                try:
                    os.setgid(65534)
                    os.setuid(65534)
                    with Reader(path) as reader:
                        status = 0 if reader.wait(2, 20) and reader.owner() else 98
                except StorageError as error:
                    status = error.errno or 97
                finally:
                    os._exit(status)
            add(machine, put(b"color", b"red"))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected


@contextmanager
def bound_read_only(state: str, path: Path) -> Iterator[Path]:
    """Mounts the directory at a second path where nothing can be written, as containers do."""
    if os.geteuid() != 0:
        cannot("only root mounts directories")
    with mounted(path, "--bind", state) as bound:
        run("mount", "-o", "remount,ro,bind", bound)
        yield bound


def test_a_read_only_mount_is_followed(machine: FastStateMachine, tmp_path: Path) -> None:
    """Readers and their watches follow a running owner, its compaction and its end, where they cannot write."""
    with bound_read_only(machine.path, tmp_path / "bound") as bound:
        with pytest.raises(OSError, match="Read-only"):
            (bound / "file").touch()
        with Reader(bound) as reader:
            watch = reader.watch()
            assert reader.owner() == os.getpid()
            for _ in range(2):
                add(machine, put(b"color", b"red"))
                assert (reader.wait(machine.last_applied().index, 20), reader.get(b"color")) == (
                    machine.last_applied(), b"red")
                assert len(watch.read()) == 1
                machine.compact(machine.last_applied())
            machine.close()
            assert (reader.refresh(), reader.owner()) == ((3, 1), None)
        with Reader(bound) as reader:
            assert reader.get(b"color") == b"red"


def test_a_read_only_file_system_is_read(tmp_path: Path) -> None:
    """What an owner left there, killed or closed, is readable without writing."""
    with ext4(tmp_path / "disk", tmp_path / "image", 16 << 20) as disk:
        with FastStateMachine(disk / "closed") as machine:
            add(machine, put(b"color", b"blue"))
        killed = FastStateMachine(disk / "killed")
        add(killed, put(b"color", b"blue"))
        inside(killed).release()
        run("mount", "-o", "remount,ro", disk)
        for name in ("closed", "killed"):
            with Reader(disk / name) as reader:
                assert (reader.get(b"color"), reader.owner(), reader.refresh()) == (b"blue", None, (1, 1))
                assert len(reader.watch(start=1).read()) == 1


def test_a_forked_child_reads_on(machine: FastStateMachine, reader: Reader) -> None:
    """A reader made before a fork follows in the child, through a compaction, with the parent's threads gone."""
    reader.count(b"a")  # the order is in use
    with inside(reader).lock:  # as if another thread were at it
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(60)
                reader.wait(2)
                reader.wait(3)
                status = 0 if reader.scan().entries == [(b"color", b"green")] and reader.stats().opened == 2 else 2
            finally:
                os._exit(status)
    assert reader.refresh() == (1, 1)
    add(machine, put(b"color", b"red"))
    reader.wait(2)
    machine.compact(machine.last_applied())
    add(machine, put(b"color", b"green"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (reader.refresh(), reader.get(b"color")) == ((3, 1), b"green")


def test_a_child_of_a_forked_child_reads_on(machine: FastStateMachine, reader: Reader) -> None:
    """A reader works in every generation of processes, whatever other threads were doing when they forked."""
    watch = reader.watch()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(20)
            held, over = threading.Event(), threading.Event()

            def follow() -> None:
                with inside(reader).lock:
                    held.set()
                    over.wait()

            threading.Thread(target=follow, daemon=True).start()
            held.wait()
            grandchild = os.fork()
            over.set()
            if grandchild:
                status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
            else:
                signal.alarm(10)
                reader.wait(2)
                status = 0 if reader.get(b"color") == b"red" and len(watch.read()) == 1 else 2
        finally:
            os._exit(status)
    add(machine, put(b"color", b"red"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("step", ["reset", "compact"])
@pytest.mark.parametrize("what", ["reader", "watch"])
def test_an_error_of_a_signal_handler_after_a_step_leaves_it_whole(
    machine: FastStateMachine, reader: Reader, step: str, what: str
) -> None:
    """After an interrupted step the reader shows the next generation, and counts the step once."""
    watch = reader.watch()
    add(machine, put(b"color", b"red"))
    assert len(watch.read()) == 1
    reader.refresh()
    machine.clear() if step == "reset" else machine.compact(machine.last_applied())
    look = reader.refresh if what == "reader" else lambda: watch.read(timeout=0)

    def interrupt(frame: Any, event: str, argument: Any) -> None:
        if event == "c_return" and getattr(argument, "__name__", "") == "_show":
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            look()
    finally:
        sys.setprofile(None)
    add(machine, put(b"color", b"green"))
    assert (reader.refresh(), reader.get(b"color")) == (machine.last_applied(), b"green")
    assert (reader.stats().rebuilt, reader.stats().opened) == (step == "reset", 2)
    assert everything(reader) == everything(machine)
    if step == "compact":
        assert [change.value for change in watch.read()] == [b"green"]
    else:
        with pytest.raises(CompactedError):
            watch.read(timeout=0)


def test_an_owner_in_a_container_with_another_number_for_this_run_is_followed(
    machine: FastStateMachine, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publications made while a reader is open belong to this run of the machine, even across a compaction."""
    watch = reader.watch()
    (tmp_path / "boot").write_bytes(b"another run")
    monkeypatch.setattr(published, "BOOT_ID", str(tmp_path / "boot"))
    for _ in range(2):
        add(machine, put(b"color", b"red"))
        assert reader.refresh() == machine.last_applied()
        assert len(watch.read(timeout=0)) == 1
        machine.compact(machine.last_applied())
        add(machine, put(b"color", b"green"))
        assert reader.refresh() == machine.last_applied()
        assert len(watch.read(timeout=0)) == 1


def test_a_publication_that_was_written_in_part_is_seen_once_it_is_whole(tmp_path: Path) -> None:
    """If the publication is written instead of stored, its number comes last too: who sees it sees the rest."""
    resource = pytest.importorskip("resource")

    class Copying(Directory):
        def stores_are_safe(self, fd: Any) -> bool:
            return False

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FastStateMachine(tmp_path, _files=Copying) as machine, Reader(tmp_path) as reader:
        for number in range(1, 20):
            before = reader.refresh()
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * (1 + number % 2) + 8, limits[1]))
            try:
                machine.update_last_applied((2 * number - 1, 1))  # not written, or up to its number alone
                assert reader.refresh().index in (before.index, 2 * number - 1)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            machine.update_last_applied((2 * number, 1))
            assert reader.refresh() == (2 * number, 1)


def test_a_closed_reader_that_ran_out_of_memory_stays_closed(
    machine: FastStateMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh after the close does not open its files again."""

    class Broken(Reader):
        __slots__ = ()
        _broken = True  # as after a table that could not grow

    reader = Broken(machine.path)
    reader.close()
    with pytest.raises(NotRunningError):
        inside(reader).follow()


def test_a_closed_reader_leaves_nothing_open(machine: FastStateMachine) -> None:
    """After `close` only the owner has descriptors and mappings of the directory."""

    def held() -> tuple[int, int]:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return len(os.listdir("/proc/self/fd")), sum(machine.path in line for line in maps)

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    machine.compact(machine.last_applied())
    add(machine, put(b"color", b"red"))
    before = held()
    for _ in range(3):
        reader = Reader(machine.path, ordered=True)
        machine.compact(machine.last_applied())
        add(machine, put(b"color", b"red"))
        reader.refresh()
        reader.close()
    assert held() == before
