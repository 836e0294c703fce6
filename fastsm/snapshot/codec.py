"""A small interface to Zstandard: a single frame, with limits on everything that a received frame may claim.

The library is Python's own from 3.14 on, otherwise the package ``zstandard``; it is imported when first needed. Neither
reports where a frame ends, so `_Frame` follows the frame's blocks while the bytes are read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fastsm.errors import SnapshotError, SnapshotFormatError
from fastsm.libraries import library

if TYPE_CHECKING:
    from typing_extensions import Buffer

LEVEL = 3
WINDOW_LIMIT = 8 << 20
PIECE = 1 << 20

MAGIC = 0xFD2FB528
RLE, RESERVED = 1, 3  # types of a block
BLOCK_LIMIT = 128 << 10


def require_compression(name: str) -> None:
    """Raises what a snapshot with this compression would raise: ``SnapshotError`` without Zstandard."""
    if name not in ("none", "zstd"):
        raise ValueError(f'snapshot_compress={name!r}: expected "none" or "zstd"')
    if name == "zstd":
        _library()


def compress(pieces: Iterable[Buffer], size: int, write: Callable[[bytes], object]) -> int:
    """Compresses pieces of ``size`` bytes in total into one frame, passed to ``write`` in parts; returns its size.

    O(size), mostly without the GIL; memory for one piece, plus a few MiB for the compressor. Raises ``SnapshotError``
    without Zstandard.
    """
    compressor = _library().compressor(size)
    written = 0
    for piece in pieces:
        made = compressor.compress(piece)
        if made:
            write(made)
            written += len(made)
    made = compressor.flush()
    write(made)
    return written + len(made)


def decompress(read: Callable[[int], Buffer], stored_size: int, flat_size: int, path: str) -> Iterator[bytes]:
    """Yields the content of the frame that ``read`` returns in order, in pieces of at most 1 MiB.

    ``read(n)`` returns at most n bytes, and none at the end. The frame must take exactly ``stored_size`` bytes and
    contain exactly ``flat_size``; otherwise, or if its window is larger than 8 MiB, a ``SnapshotFormatError`` names
    ``path``. Nothing beyond those sizes is read or kept: O(stored_size + flat_size), with about 10 MiB of memory.
    """
    zstd = _library()
    frame = _Frame(read, stored_size, flat_size, path)
    left = flat_size
    try:
        reader = zstd.reader(frame)
        while piece := reader.read(min(PIECE, left + 1)):
            if len(piece) > left:
                raise frame.error(f"{flat_size} bytes of content", "more")
            left -= len(piece)
            yield piece
    except (zstd.error, EOFError) as error:
        raise frame.error("a Zstandard frame", str(error)) from None
    if left:
        raise frame.error(f"{flat_size} bytes of content", f"{flat_size - left} bytes")
    frame.check_end()


class _Frame:
    """The compressed bytes as they are read, and the position within the frame (RFC 8878, section 3.1.1)."""

    def __init__(self, read: Callable[[int], Buffer], size: int, content_size: int, path: str) -> None:
        self._read = read
        self._size = size
        self._content_size = content_size
        self._path = path
        self._offset = 0
        self._head = bytearray()      # of the frame, then of each block
        self._wanted = 5              # the size of the head: magic, descriptor
        self._skip = 0                # bytes before the next head
        self._checksum = 0            # bytes after the last block
        self._in_blocks = self._last = False

    def error(self, expected: str, found: str) -> SnapshotFormatError:
        return SnapshotFormatError(
            f"{self._path}, compressed state, offset {self._offset}: expected {expected}, found {found}; "
            "this is not a complete fastsm snapshot: get it again"
        )

    def read(self, size: int = PIECE) -> bytes:
        """Returns the next bytes of the frame to the library; none at its end."""
        piece = bytes(self._read(min(size, PIECE, self._size - self._offset)))
        self._follow(piece)
        return piece

    def check_end(self) -> None:
        """Checks that the frame is complete, and that nothing else was stored after it."""
        while self.read():
            pass
        if not self._done or self._offset != self._size:
            raise self.error(f"a frame of {self._size} bytes", "one without an end")

    @property
    def _done(self) -> bool:
        return self._last and not self._skip

    def _follow(self, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            if self._skip:
                step = min(self._skip, len(piece) - at)
                self._skip -= step
            elif self._done:
                raise self.error("the end", f"{self._size - self._offset} bytes after the frame")
            else:
                step = min(self._wanted - len(self._head), len(piece) - at)
                self._head += piece[at : at + step]
                if len(self._head) == self._wanted:
                    self._look_at_head()
            at += step
            self._offset += step

    def _look_at_head(self) -> None:
        head = int.from_bytes(self._head, "little")
        if self._in_blocks:
            self._last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
            if kind == RESERVED or (size > BLOCK_LIMIT and kind != RLE):
                raise self.error("a block", f"type {kind}, {size} bytes")
            self._skip = (1 if kind == RLE else size) + (self._checksum if self._last else 0)
            self._head.clear()
            return
        if head & 0xFFFFFFFF != MAGIC:
            raise self.error("a Zstandard frame", f"magic {head & 0xFFFFFFFF:#x}")
        descriptor = self._head[4]
        single = descriptor >> 5 & 1
        window_bytes = 0 if single else 1
        id_bytes = (0, 1, 2, 4)[descriptor & 3]
        size_bytes = (single, 2, 4, 8)[descriptor >> 6]
        self._wanted = 5 + window_bytes + id_bytes + size_bytes
        if len(self._head) < self._wanted:
            return
        content_size = int.from_bytes(self._head[5 + window_bytes + id_bytes :], "little")
        content_size += 256 if size_bytes == 2 else 0
        # For a single segment, the window is the whole content.
        window = content_size if single else (1 << 10 + (self._head[5] >> 3)) // 8 * (8 + (self._head[5] & 7))
        # The library does not compare the size of empty content.
        if size_bytes and content_size != self._content_size:
            raise self.error(f"{self._content_size} bytes of content", f"{content_size} bytes, says the frame")
        if window > WINDOW_LIMIT:
            raise self.error(f"a window of at most {WINDOW_LIMIT} bytes", f"{window} bytes")
        self._checksum = 4 * (descriptor >> 2 & 1)
        self._in_blocks, self._wanted = True, 3
        self._head.clear()


# ---- the two libraries ---------------------------------------------------------------------------------

class _Zstandard:
    """The package ``zstandard``."""

    def __init__(self, zstandard: Any) -> None:
        self._zstandard = zstandard
        self.error = zstandard.ZstdError

    def compressor(self, size: int) -> Any:
        return self._zstandard.ZstdCompressor(level=LEVEL).compressobj(size=size)

    def reader(self, source: _Frame) -> Any:
        decompressor = self._zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT)
        try:
            return decompressor.stream_reader(source, read_size=PIECE)
        except TypeError as error:  # the package also raises this if memory runs out while it looks for `read`
            raise MemoryError(f"not enough memory to read {source._path}") from error


class _Own:
    """Python's own ``compression.zstd``."""

    def __init__(self, zstd: Any) -> None:
        self._zstd = zstd
        self.error = zstd.ZstdError

    def compressor(self, size: int) -> Any:
        compressor = self._zstd.ZstdCompressor(level=LEVEL)
        compressor.set_pledged_input_size(size)
        return compressor

    def reader(self, source: _Frame) -> Any:
        window_log = WINDOW_LIMIT.bit_length() - 1
        return self._zstd.ZstdFile(source, options={self._zstd.DecompressionParameter.window_log_max: window_log})


@functools.cache
def _library() -> _Zstandard | _Own:
    """Imports the library by name, since versions of Python differ in which one exists."""
    for name, wrapper in (("compression.zstd", _Own), ("zstandard", _Zstandard)):
        with contextlib.suppress(ImportError):
            return wrapper(library(name))
    raise SnapshotError('snapshots with compress="zstd" need the package zstandard: pip install "fastsm[zstd]"')
