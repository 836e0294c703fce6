"""The small values: a snapshot's metadata as bytes; changes and entries."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from pathlib import Path

import pytest

import fastsm
from fastsm import FormatVersionError, LogId, SnapshotFormatError, SnapshotMetadata

METADATA = SnapshotMetadata(LogId(7, 2**64 - 2), bytes(range(32)))


def test_metadata_comes_back_from_its_bytes() -> None:
    """Metadata with any index, term and checksum become 64 bytes, and are read back from any buffer."""
    for log_id in (LogId(7, 2), LogId(0, 0), LogId(2**64 - 1, 0)):
        metadata = SnapshotMetadata(log_id, b"x" * 32)
        data = metadata.to_bytes()
        assert len(data) == 64
        assert SnapshotMetadata.from_bytes(data) == SnapshotMetadata.from_bytes(memoryview(bytearray(data))) == metadata
    assert type(SnapshotMetadata.from_bytes(data).last_included) is LogId


def test_the_bytes_are_those_of_the_page_of_formats() -> None:
    """The bytes are the test vector: magic, version, index, term, checksum, and eight bytes of BLAKE3 of those."""
    assert METADATA.to_bytes().hex() == (
        "46534d4d00000000" "0700000000000000" "feffffffffffffff"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f" "aecf290194962349"
    )


@pytest.mark.parametrize("bit", range(512))
def test_a_flipped_bit_is_found(bit: int) -> None:
    """Each of the 512 bits, if flipped, gives a ``SnapshotFormatError``."""
    data = bytearray(METADATA.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotFormatError):
        SnapshotMetadata.from_bytes(data)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 128])
def test_metadata_of_another_size_is_refused(size: int) -> None:
    """Metadata of another size is refused; the error says how many bytes were expected and found."""
    with pytest.raises(SnapshotFormatError, match=f"expected 64 bytes, found {size}"):
        SnapshotMetadata.from_bytes((METADATA.to_bytes() * 2)[:size])


def test_a_later_version_says_so() -> None:
    """Bytes of another version with a correct checksum give a ``FormatVersionError``, not corruption."""
    import blake3  # noqa: PLC0415

    fields = bytearray(METADATA.to_bytes()[:56])
    fields[4] = 9
    with pytest.raises(FormatVersionError, match="format version 9"):
        SnapshotMetadata.from_bytes(bytes(fields) + blake3.blake3(fields).digest(length=8))


@pytest.mark.parametrize("metadata", [
    SnapshotMetadata(LogId(1, 1), bytes(31)), SnapshotMetadata(LogId(-1, 1), bytes(32)),
    SnapshotMetadata(LogId(1, 2**64), bytes(32))])
def test_invalid_metadata_cannot_be_encoded(metadata: SnapshotMetadata) -> None:
    """A checksum of another size, or a number outside of 64 bits, gives a ``ValueError``."""
    with pytest.raises(ValueError, match="expected"):
        metadata.to_bytes()


def test_changes_and_entries_are_named_tuples_that_the_collector_need_not_look_at(tmp_path: Path) -> None:
    """Tuples made by compiled code behave like those made by Python, except that the collector does not track them."""
    with fastsm.FastStateMachine(tmp_path / "state") as machine, fastsm.RaftLog(tmp_path / "log") as log:
        machine.apply([(1, 7, fastsm.put(b"key", b"value")), (2, 7, fastsm.delete(b"key"))])
        log.append([(1, 7, b"command")])
        told, found = machine.watch(start=1).read(), log.entries(1, 1)
        references = sys.getrefcount(fastsm.Change) + sys.getrefcount(fastsm.Entry)
        for _ in range(1000):  # each tuple that is freed releases its reference to its class
            machine.watch(start=1).read()
            log.entries(1, 1)
        assert abs(sys.getrefcount(fastsm.Change) + sys.getrefcount(fastsm.Entry) - references) < 1000
    assert told == [fastsm.Change(1, 7, b"key", b"value"), fastsm.Change(2, 7, b"key", None)]
    assert found == [fastsm.Entry(1, 7, b"command")]
    for one in (*told, *found):
        assert type(one)._make(one) == one
        assert hash(type(one)._make(one)) == hash(one)
        assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
        assert repr(one).startswith(type(one).__name__)
        assert not gc.is_tracked(one)
