"""Zstandard within bounds: one whole frame of the announced size, in little memory, from any writer."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard

import fastsm
from fastsm import SnapshotError, SnapshotFormatError, libraries, open_snapshot
from fastsm.snapshot import codec
from fastsm.snapshot.writer import write_snapshot_file
from support.snapshots import StateSource, some_state


def compressed(data: bytes) -> bytes:
    """Return a frame as the writer makes it."""
    parts: list[bytes] = []
    size = codec.compress([data[at : at + 70_000] for at in range(0, len(data), 70_000)], len(data), parts.append)
    assert size == sum(map(len, parts))
    return b"".join(parts)


def expand(frame: bytes, flat_size: int, stored_size: int | None = None) -> bytes:
    """Return the content of a frame."""
    stored_size = len(frame) if stored_size is None else stored_size
    pieces = list(codec.decompress(io.BytesIO(frame).read, stored_size, flat_size, "file"))
    assert all(len(piece) <= codec.PIECE for piece in pieces)
    return b"".join(pieces)


SAMPLES = [b"", b"x", b"text " * 1000, random.Random(1).randbytes(300_000), bytes(5 << 20)]


@pytest.mark.parametrize("data", SAMPLES, ids=len)
def test_compressed_content_is_expanded(data: bytes) -> None:
    """Any bytes, including none, are expanded to what was compressed."""
    assert expand(compressed(data), len(data)) == data


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"write_checksum": True},
        {"write_content_size": False},
        {"write_checksum": True, "write_content_size": False},
    ],
)
@pytest.mark.parametrize("data", SAMPLES, ids=len)
def test_frames_of_other_writers_are_expanded(data: bytes, options: dict[str, bool]) -> None:
    """Frames with and without a size and a checksum are expanded."""
    assert expand(zstandard.ZstdCompressor(level=1, **options).compress(data), len(data)) == data


@pytest.mark.parametrize("data", SAMPLES[1:], ids=len)
def test_another_size_than_announced_is_a_format_error(data: bytes) -> None:
    """Content one byte longer or shorter than announced is refused, with and without a size in the frame."""
    for frame in (compressed(data), zstandard.ZstdCompressor(write_content_size=False).compress(data)):
        for size in (len(data) - 1, len(data) + 1, 0):
            with pytest.raises(SnapshotFormatError):
                expand(frame, size)


def test_a_frame_cut_anywhere_is_a_format_error() -> None:
    """A frame that is cut anywhere is refused, even if all of its content is there."""
    data = random.Random(2).randbytes(500) * 3
    for checksum in (False, True):
        frame = zstandard.ZstdCompressor(write_checksum=checksum).compress(data)
        for size in range(len(frame)):
            with pytest.raises(SnapshotFormatError):
                expand(frame[:size], len(data))
            with pytest.raises(SnapshotFormatError):
                expand(frame[:size], len(data), len(frame))


@pytest.mark.parametrize("tail", [b"\0", b"tail", compressed(b""), compressed(b"x"), b"\x50\x2a\x4d\x18" + bytes(4)],
                         ids=["zero", "bytes", "an empty frame", "a frame", "a skippable frame"])
def test_anything_after_the_frame_is_a_format_error(tail: bytes) -> None:
    """Bytes after the frame, even another frame, are refused."""
    for data in (b"", b"x", bytes(3 << 20)):
        with pytest.raises(SnapshotFormatError, match="after the frame"):
            expand(compressed(data) + tail, len(data))
        with pytest.raises(SnapshotFormatError):
            expand(compressed(data) + tail, len(data) + 1)


@pytest.mark.parametrize("frame", [b"", b"no frame at all", b"\x50\x2a\x4d\x18" + bytes(4), b"\x28\xb5\x2f\xfd\x20"],
                         ids=["nothing", "text", "skippable", "a head alone"])
def test_an_invalid_zstd_frame_is_a_format_error(frame: bytes) -> None:
    """Bytes that are not a frame, and a frame without content, are refused."""
    for size in (0, 10):
        with pytest.raises(SnapshotFormatError):
            expand(frame, size)


def test_flipped_bytes_are_a_format_error_or_other_content() -> None:
    """A flipped byte never causes a crash, a hang, or more content than announced."""
    data = b"some text, some more text, and some " * 40
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    for at in range(len(frame)):
        for flip in (1, 0x80, 0xFF):
            damaged = frame[:at] + bytes([frame[at] ^ flip]) + frame[at + 1 :]
            with contextlib.suppress(SnapshotFormatError):
                assert len(expand(damaged, len(data))) == len(data)


def test_a_large_window_is_refused() -> None:
    """A window or a single segment of 16 MiB, which would take that memory, is refused: the limit is 8 MiB."""
    data = bytes(range(256)) * (9 << 12)
    for window_log, fits in ((23, True), (24, False)):
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, write_content_size=False)
        maker = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        frame = maker.compress(data) + maker.flush()
        if fits:
            assert expand(frame, len(data)) == data
        else:
            with pytest.raises(SnapshotFormatError, match="window"):
                expand(frame, len(data))
    single = zstandard.ZstdCompressionParameters.from_level(1, window_log=24)
    frame = zstandard.ZstdCompressor(compression_params=single).compress(data)
    with pytest.raises(SnapshotFormatError, match="window"):
        expand(frame, len(data))


def bomb(size: int) -> bytes:
    """Return a frame of blocks that repeat one byte: 4 bytes for 128 KiB each."""
    blocks = size // codec.BLOCK_LIMIT
    block = (codec.BLOCK_LIMIT << 3 | codec.RLE << 1).to_bytes(3, "little") + b"b"
    return b"\x28\xb5\x2f\xfd\x00\x58" + block * blocks + b"\x01\x00\x00"


def test_a_bomb_takes_little_memory() -> None:
    """A frame of 32 KiB for 1 GiB is refused at the first unannounced byte; if announced, it comes in small pieces."""
    frame = bomb(1 << 30)
    assert expand(bomb(1 << 22), 1 << 22) == b"b" * (1 << 22)
    tracemalloc.start()
    with pytest.raises(SnapshotFormatError, match="more"):
        expand(frame, 3 << 20)
    taken = 0
    for piece in codec.decompress(io.BytesIO(frame).read, len(frame), 1 << 30, "file"):
        taken += len(piece)
        if taken > 64 << 20:
            break
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python's own library is used")
def test_a_reader_without_memory_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package raises TypeError if it has no memory to look for the method `read`, which is there."""

    class Decompressor:
        def __init__(self, **_: object) -> None:
            pass

        def stream_reader(self, *_: object, **__: object) -> None:
            raise TypeError("must pass an object with a read() method or that conforms to the buffer protocol")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", Decompressor)
    with pytest.raises(MemoryError, match="a snapshot"):
        list(codec.decompress(io.BytesIO(b"").read, 0, 0, "a snapshot"))


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without zstandard, the codec zstd raises a ``SnapshotError`` with the install command; the codec none works."""
    write_snapshot_file(tmp_path / "zstd", StateSource(some_state()), compress="zstd")
    monkeypatch.setattr(codec, "_library", codec._library.__wrapped__)  # the cached result would be used
    monkeypatch.setattr(libraries, "_imported", {})
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(SnapshotError, match=r'pip install "fastsm\[zstd\]"') as caught:
        write_snapshot_file(tmp_path / "new", StateSource(some_state()), compress="zstd")
    assert type(caught.value) is SnapshotError
    assert os.listdir(tmp_path / "new") == []
    with open_snapshot(tmp_path / "zstd") as snapshot, pytest.raises(SnapshotError, match="pip install"):
        snapshot.verify()
    write_snapshot_file(tmp_path / "new", StateSource(some_state()))


def test_without_zstandard_opening_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zstandard, an opening with ``snapshot_compress="zstd"`` fails, and makes and locks nothing."""
    def missing() -> None:
        raise fastsm.SnapshotError("install fastsm[zstd]")

    monkeypatch.setattr(codec, "_library", missing)
    with pytest.raises(fastsm.SnapshotError, match="install"):
        fastsm.FastStateMachine(tmp_path / "state", snapshot_compress="zstd")
    assert not (tmp_path / "state").exists()
    fastsm.FastStateMachine(tmp_path / "state", snapshot_compress="none").close()
