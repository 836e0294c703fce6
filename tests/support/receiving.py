"""A snapshot to be received, and how it is sent."""

from __future__ import annotations

from fastsm import LogId, SnapshotMetadata, SnapshotReceiver
from fastsm.snapshot.model import snapshot_bytes
from support.snapshots import some_state

DATA = snapshot_bytes(some_state(), "none", b"hello")
PART = "snapshot.fsm.part"


def feed(receiver: SnapshotReceiver, data: bytes = DATA, step: int = 100, stop: int | None = None) -> None:
    """Sends pieces from where the receiver is."""
    stop = len(data) if stop is None else stop
    while receiver.offset < stop:
        at = receiver.offset
        assert receiver.write(at, data[at : min(at + step, stop)]) == min(at + step, stop)


def metadata_of(data: bytes) -> SnapshotMetadata:
    index, term = int.from_bytes(data[16:24], "little"), int.from_bytes(data[24:32], "little")
    return SnapshotMetadata(LogId(index, term), data[128:160])
