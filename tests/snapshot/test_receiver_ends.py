"""The end of a transfer: finish and discard on event loops, on a failing disk, and with the part in other hands."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from fastsm import Snapshot, SnapshotError, SnapshotReceiver, StorageError
from fastsm.disk.files import Directory
from support.receiving import DATA, PART, feed


def test_finish_on_an_event_loop_leaves_the_loop_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop runs while the file is checked; every other call is refused meanwhile, and works afterwards."""
    checking, go_on = threading.Event(), threading.Event()

    def held(snapshot: Snapshot) -> None:
        checking.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Snapshot, "verify", held)

    async def story() -> str:
        with SnapshotReceiver(tmp_path) as receiver:
            feed(receiver)
            finishing = asyncio.ensure_future(receiver.finish_async())
            while not checking.is_set():
                await asyncio.sleep(0.001)
            for call in (receiver.finish, receiver.discard, lambda: receiver.write(0, b"x")):
                with pytest.raises(SnapshotError, match="finish_async is running; await its end first"):
                    call()
            with pytest.raises(SnapshotError, match="finish_async is running"):
                await receiver.finish_async()
            go_on.set()
            path = await finishing
            assert receiver.finish() == path == await receiver.finish_async()
        return path

    assert Path(asyncio.run(story())).read_bytes() == DATA


def test_a_cancelled_finish_goes_on_and_close_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling the await stops nothing: when ``close`` returns, the file has its name, and no thread has it open."""
    checking, go_on, verify = threading.Event(), threading.Event(), Snapshot.verify

    def held(snapshot: Snapshot) -> None:
        checking.set()
        assert go_on.wait(60)
        verify(snapshot)

    monkeypatch.setattr(Snapshot, "verify", held)

    async def story() -> None:
        with SnapshotReceiver(tmp_path) as receiver:
            feed(receiver)
            finishing = asyncio.ensure_future(receiver.finish_async())
            while not checking.is_set():
                await asyncio.sleep(0.001)
            finishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finishing
            go_on.set()

    asyncio.run(story())
    assert [path.name for path in tmp_path.iterdir() if path.name != "LOCK"] == ["snapshot.fsm"]
    assert (tmp_path / "snapshot.fsm").read_bytes() == DATA


def test_a_finish_that_fails_on_an_event_loop_may_be_tried_again(tmp_path: Path) -> None:
    """What ``finish`` raises, the await raises; the receiver is as after ``finish``."""

    async def story() -> None:
        with SnapshotReceiver(tmp_path) as receiver:
            feed(receiver, stop=len(DATA) - 1)
            with pytest.raises(SnapshotError, match="write the rest first"):
                await receiver.finish_async()
            feed(receiver)
            await receiver.finish_async()
        with pytest.raises(SnapshotError, match="is closed"):
            await receiver.finish_async()

    asyncio.run(story())
    assert (tmp_path / "snapshot.fsm").read_bytes() == DATA


@pytest.mark.parametrize("removed", [False, True])
def test_a_discard_that_fails_says_so_and_the_transfer_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """The receiver then expects the first byte again, whether the part is gone or not; the same bytes complete it."""
    unlink = Directory.unlink

    def fail(directory: Directory, name: str) -> None:
        if removed:
            unlink(directory, name)
        raise OSError(errno.EIO, "the disk says no")

    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver, stop=500)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "unlink", fail)
            with pytest.raises(StorageError, match="the disk says no"):
                receiver.discard()
        assert (receiver.offset, receiver.complete) == (0, False)
        assert receiver.write(0, DATA[:100]) == (100 if removed else 500)
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA


def test_a_finish_whose_last_sync_failed_is_not_durable_until_that_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call raises as long as the directory cannot be synced: a path is given only for a name that stays."""
    synced: list[str] = []

    def no_sync(directory: Directory) -> None:
        raise OSError(errno.EIO, "the disk says no")

    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "sync_directory", no_sync)
            for _ in range(2):
                with pytest.raises(StorageError):
                    receiver.finish()
        monkeypatch.setattr(Directory, "sync_directory", lambda directory: synced.append(directory.path))
        assert Path(receiver.finish()).read_bytes() == DATA
        receiver.finish()
    assert synced == [str(tmp_path)]


def test_a_rename_that_reports_an_error_after_it_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next ``finish`` finds the file under its name, and leaves alone what another receiver does meanwhile."""
    rename = Directory.rename

    def do_and_fail(directory: Directory, source: str, target: str) -> None:
        rename(directory, source, target)
        raise OSError(errno.EIO, "the reply was lost")

    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "rename", do_and_fail)
            with pytest.raises(StorageError, match="the reply was lost"):
                receiver.finish()
        with SnapshotReceiver(tmp_path) as another:
            feed(another, stop=300)
            assert Path(receiver.finish()).read_bytes() == DATA
            assert another.write(300, DATA[300:400]) == 400


@pytest.mark.parametrize("end", ["discard", "close"])
def test_another_receiver_s_part_stays(tmp_path: Path, end: str) -> None:
    """A receiver whose part was removed, and made again by another one, removes nothing."""
    with SnapshotReceiver(tmp_path) as receiver:
        if end == "discard":
            receiver.write(0, DATA[:100])
        (tmp_path / PART).unlink()
        with SnapshotReceiver(tmp_path) as other:
            other.write(0, DATA[:1000])
            getattr(receiver, end)()
            other.write(1000, DATA[1000:])
            assert Path(other.finish()).read_bytes() == DATA


@pytest.mark.parametrize("replaced", [False, True])
def test_a_part_that_somebody_removed_is_never_taken_for_another(tmp_path: Path, replaced: bool) -> None:
    """``finish`` says so, whatever has the name by now, and the transfer starts over."""
    with SnapshotReceiver(tmp_path) as receiver:
        feed(receiver)
        (tmp_path / PART).unlink()
        if replaced:
            (tmp_path / PART).write_bytes(b"something else")
        with pytest.raises(SnapshotError, match="removed or replaced it; the transfer starts over"):
            receiver.finish()
        assert receiver.offset == 0
        assert not (tmp_path / "snapshot.fsm").exists()
        feed(receiver)
        assert Path(receiver.finish()).read_bytes() == DATA
