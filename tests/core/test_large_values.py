"""Large values are written straight from the commands' own bytes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsm
from fastsm.disk import hashing
from fastsm.disk.files import Directory


class OneByOne(Directory):
    """A directory whose frames are written in one piece, as for any class that replaces the disk."""

    @staticmethod
    def write(fd: object, data: object, offset: int) -> None:
        Directory.write(fd, data, offset)


@given(parts=st.lists(st.binary(max_size=100), max_size=64), seed=st.integers(0, 2**64 - 1))
def test_the_sum_of_parts_is_that_of_all_bytes(parts: list[bytes], seed: int) -> None:
    """The checksum does not depend on where the bytes are split."""
    assert hashing.checksum_of_parts(parts, seed) == hashing.checksum(b"".join(parts), seed)


SIZES = st.sampled_from([0, 1, 7, 100, 4095, 4096, 4097, 9000, 70_001, 1 << 20])


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.lists(SIZES, min_size=1, max_size=8), min_size=1, max_size=5), kind=st.sampled_from("pcb"))
def test_a_log_is_the_same_byte_for_byte_however_its_frames_were_written(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[int]], kind: str
) -> None:
    """Written in parts or in one piece, there are the same places, frames and state after reopening."""
    path = tmp_path_factory.mktemp("states")
    found = []
    for number, files in enumerate((Directory, OneByOne)):
        with fastsm.FastStateMachine(path / str(number), auto_compact=False, _files=files) as machine:
            index = 0
            for sizes in chunks:
                entries = []
                for size in sizes:
                    index += 1
                    key, value = b"key %d" % (index % 7), bytes([index & 0xFF]) * size
                    command = fastsm.put(key, value)
                    if kind == "c":
                        command = fastsm.compare_and_swap(b"other %d" % index, None, value)
                    elif kind == "b":
                        command = fastsm.batch([command, fastsm.put(key + b"!", value), fastsm.delete(b"key 3")])
                    entries.append((index, 1, command))
                assert machine.apply(entries) == [True] * len(entries)
            state = dict(machine.items())
            machine.verify()
            end = machine.stats().log_bytes
            log = (path / str(number) / "log-1").read_bytes()[:end]
        for table in (path / str(number)).glob("table-*"):
            table.unlink()
        with fastsm.FastStateMachine(path / str(number), verify_on_open="full") as machine:
            assert dict(machine.items()) == state
        found.append((state, end, len(log)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "sizes", [
        [(128 << 10) - 200], [(128 << 10) - 100, 5000], [128 << 10, 128 << 10], [(1 << 20) + 7], [300_001, 1, 300_001],
        [4096] * 200, [5001] * 65, [1, 200_000, 1, 4096, 70_000] * 20,
    ], ids=lambda sizes: f"{len(sizes)}-of-{sizes[0]}")  # fmt: skip
@pytest.mark.parametrize("before", [0, 1, 4000, 100_000])
def test_a_frame_in_pieces_is_read_again(tmp_path: Path, sizes: list[int], before: int) -> None:
    """Wherever its pieces and parts end, and wherever in the file it starts."""
    with fastsm.FastStateMachine(tmp_path / "state", auto_compact=False) as machine:
        machine.apply([(1, 1, fastsm.put(b"before", bytes(before)))])
        entries = [(i, 1, fastsm.put(b"key %d" % i, os.urandom(size))) for i, size in enumerate(sizes, 2)]
        assert machine.apply(entries) == [True] * len(entries)
        machine.apply([(len(sizes) + 2, 1, fastsm.put(b"after", b"small"))])
        state = dict(machine.items())
        assert [state[b"key %d" % i] for i, _ in enumerate(sizes, 2)] == [
            fastsm.decode(command).value for _, _, command in entries
        ]
        shutil.copytree(tmp_path / "state", tmp_path / "killed")
    (tmp_path / "killed" / "LOCK").unlink()
    with fastsm.FastStateMachine(tmp_path / "killed", verify_on_open="full") as machine:
        assert dict(machine.items()) == state


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit of file sizes")
def test_a_full_disk_amid_a_frame_in_parts_leaves_nothing_of_it(tmp_path: Path) -> None:
    """The chunk is not applied, the next one that fits is, and reopening finds only that one."""
    with fastsm.FastStateMachine(tmp_path / "state", auto_compact=False) as machine:
        machine.apply([(1, 1, fastsm.put(b"key", b"v" * 100_000))])
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(fastsm.StorageError) as raised:
                machine.apply([(2, 1, fastsm.put(b"key", b"w" * (2 << 20)))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert raised.value.errno == errno.EFBIG
        assert machine.last_applied().index == 1
        assert machine.get(b"key") == b"v" * 100_000
        machine.apply([(2, 1, fastsm.put(b"key", b"x" * 50_000))])
    with fastsm.FastStateMachine(tmp_path / "state", verify_on_open="full") as machine:
        assert machine.get(b"key") == b"x" * 50_000


def test_begun_writeback_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """The writeback thread uses the file's own descriptor, and a close first takes it back."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        with fastsm.FastStateMachine(tmp_path / str(number), auto_compact=False) as machine:
            for index in range(1, 30):
                machine.apply([(index, 1, fastsm.put(b"key", bytes(1 << 20)))])
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_begins_writeback_of_its_own(tmp_path: Path) -> None:
    """The thread exists only in the parent: the child starts its own with the first piece."""
    with fastsm.FastStateMachine(tmp_path / "parent", auto_compact=False) as machine:
        for index in range(1, 10):
            machine.apply([(index, 1, fastsm.put(b"key", bytes(1 << 20)))])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with fastsm.FastStateMachine(tmp_path / "child", auto_compact=False) as own:
                    for index in range(1, 10):
                        own.apply([(index, 1, fastsm.put(b"key", bytes(1 << 20)))])
                    own.flush()
                    status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        machine.flush()
