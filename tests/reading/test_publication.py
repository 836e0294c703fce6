"""What is published, moment by moment: an owner that stops between any two stores, and mistakes that must show."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastsm import (
    Change,
    CompactedError,
    CorruptionError,
    FastsmError,
    FastStateMachine,
    MemoryStateMachine,
    Reader,
    StorageError,
    put,
)
from fastsm.disk import published
from fastsm.disk.files import Directory
from fastsm.generation import current
from fastsm.reading import news
from fastsm.reading import reader as reading
from fastsm.reading.watching import ReaderWatch, Tail
from support.faulty import memory_directory
from support.inside import inside
from support.power import Platter, Point
from support.publishing import ByHand, Moment, checksum_of, read_page, read_step, take_all_news


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No owner is recovering in these tests, so damage is reported immediately."""
    monkeypatch.setattr(news, "RECOVERY_SECONDS", 0.0)


class Written(NamedTuple):
    """A directory whose owner was killed, and what it had to publish after each chunk."""

    path: Path
    moments: list[Moment]


def write(path: Path, colors: list[bytes], term: int = 1) -> Written:
    """Apply one chunk for each color; each is a moment."""
    moments = []
    machine = FastStateMachine(path, auto_compact=False)
    for color in colors:
        index = machine.last_applied().index + 1
        machine.apply([(index, term, put(b"color", color)), (index + 1, term, put(b"again", color))])
        log = inside(machine).log
        moments.append(Moment(log.head.identity, log.end, index + 1, term))
    inside(machine).release()
    return Written(path, moments)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write(tmp_path / "state", [b"%d" % number for number in range(6)])


@pytest.fixture
def owned(written: Written) -> Iterator[Written]:
    """The same with an owner: this process."""
    directory = Directory(written.path)
    directory.lock()
    yield written
    directory.close()


def look(reader: Reader) -> tuple[int, bytes | None]:
    """Return the entry and the color that a reader shows; both keys of a chunk have that color."""
    index = reader.refresh().index
    color, again = reader.get_many([b"color", b"again"])
    assert color == again, "half of a chunk"
    return index, color


# ---- each store --------------------------------------------------------------------------------------

def schedule(written: Written, *, make: Callable[[Path], Reader] = Reader, **mistake: Any) -> list[str]:
    """Publishes moment after moment, store by store; returns impossible things that readers saw in between."""
    wrong = []
    (written.path / published.NAME).write_bytes(published.HEADER.ljust(4096, b"\0"))
    by_hand = ByHand(written.path, **mistake)
    by_hand.publish(written.moments[0])
    with make(written.path) as reader:
        for number, moment in enumerate(written.moments[1:], 1):
            before, after = written.moments[number - 1].index, moment.index
            for done in by_hand.stores(moment):
                allowed = {after} if done else {before}
                try:
                    with make(written.path) as fresh:
                        found = {look(reader)[0], look(fresh)[0]}
                        colors = {look(reader)[1]}
                except (FastsmError, AssertionError) as error:
                    wrong.append(f"moment {number}: {error}")
                    continue
                if not found <= allowed:
                    wrong.append(f"moment {number}: entries {found}, expected {allowed}")
                if colors != {b"%d" % (next(iter(found)) // 2 - 1)}:
                    wrong.append(f"moment {number}: {colors} at {found}")
    return wrong


def test_each_store_leaves_one_publication_whole(owned: Written) -> None:
    """A reader that looks, or opens, between any two stores shows the previous publication, or the new one."""
    assert schedule(owned) == []


@pytest.mark.parametrize("mistake", ["one slot", "number first", "no checksum", "before the frame is whole"])
def test_a_planted_mistake_is_found(owned: Written, mistake: str) -> None:
    """Each of these owners misleads a reader, and the schedule detects it."""
    assert schedule(owned, mistake=mistake) != []


def watched(written: Written, **mistake: Any) -> list[str]:
    """Publishes moment after moment, store by store; returns impossible things that watches delivered in between."""
    wrong = []
    (written.path / published.NAME).write_bytes(published.HEADER.ljust(4096, b"\0"))
    by_hand = ByHand(written.path, **mistake)
    by_hand.publish(written.moments[0])
    first = written.moments[0].index + 1
    with Reader(written.path) as reader:
        watch = reader.watch()
        told: list[int] = []
        for number, moment in enumerate(written.moments[1:], 1):
            for done in by_hand.stores(moment):
                last = moment.index if done else written.moments[number - 1].index
                try:
                    told += [change.index for change in watch.read(timeout=0)]
                    with Reader(written.path) as other:
                        fresh = [change.index for change in other.watch(start=first).read(timeout=0)]
                except FastsmError as error:
                    wrong.append(f"moment {number}: {error}")
                    continue
                if (told, fresh) != (list(range(first, last + 1)),) * 2:
                    wrong.append(f"moment {number}: told of {told}, and {fresh}, expected those up to {last}")
    return wrong


def test_each_store_leaves_watches_whole(owned: Written) -> None:
    """A watch that looks, or begins, between any two stores delivers every published change, once."""
    assert watched(owned) == []


@pytest.mark.parametrize("mistake", ["one slot", "number first", "no checksum", "before the frame is whole"])
def test_a_planted_mistake_is_found_by_watches(owned: Written, mistake: str) -> None:
    """Each of these owners misleads a watch, and the schedule detects it."""
    assert watched(owned, mistake=mistake) != []


def followed(path: Path) -> tuple[list[Change], list[Change]]:
    """Return what a watch delivers across compactions, and the model's list of changes."""
    model = MemoryStateMachine()
    told = []
    with FastStateMachine(path, retain_entries=0) as machine, Reader(path) as reader:
        watch = reader.watch()
        for index in range(1, 60):
            for one in (machine, model):
                one.apply([(index, 1, put(b"color", b"%d" % index))])
            if index % 10 == 3:
                told += watch.read(timeout=0)
            if index % 10 == 5:
                machine.compact(index - 2)
        told += watch.read(timeout=0)
    return told, model.watch(start=1).read(timeout=0)


def test_a_watch_tells_everything_through_compactions(tmp_path: Path) -> None:
    """Delivered changes are compacted, and the others are delivered from the next log."""
    told, expected = followed(tmp_path)
    assert told == expected


def test_a_watch_that_skips_at_a_compaction_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that continues at the end of the next log loses undelivered changes: the comparison detects it."""

    class Skipping(ReaderWatch):
        __slots__ = ()

        def _look(self) -> None:
            before = self._source.identity
            super()._look()
            if before != self._source.identity:
                self._collect([], 1 << 20, 1 << 30, False)

    monkeypatch.setattr(reading, "ReaderWatch", Skipping)
    told, expected = followed(tmp_path)
    assert told != expected


def test_a_watch_that_trusts_an_old_generation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that ignores the log's identity stops after a compaction: the comparison detects it."""

    class Trusting(Tail):
        __slots__ = ()

        def _take_news(self) -> None:
            publication = self._lookout.publication
            seen = None if publication is None else publication.read()
            if seen is not None and seen.identity == self._log.head.identity:
                self._take_up_to(seen.end, seen.applied_index, seen.applied_term, seen.durable_index)

    monkeypatch.setattr(reading, "Tail", Trusting)
    told, expected = followed(tmp_path)
    assert told != expected


def test_a_reader_that_trusts_an_old_generation_is_found(tmp_path: Path) -> None:
    """A reader that ignores the log's identity stops after a compaction: the comparison detects it."""

    class Trusting(Reader):
        __slots__ = ()

        def _take_news(self) -> None:
            take_all_news(self)

    def follow(kind: type[Reader]) -> bytes | None:
        with FastStateMachine(tmp_path / kind.__name__) as machine, kind(machine.path) as reader:
            machine.apply([(index, 1, put(b"color", b"%d" % index)) for index in range(1, 100)])
            reader.refresh()
            machine.compact(99)
            machine.apply([(100, 1, put(b"color", b"100"))])
            reader.refresh()
            return reader.get(b"color")

    assert (follow(Reader), follow(Trusting)) == (b"100", b"99")


@pytest.mark.parametrize("changes", [True, False])
def test_an_incarnation_that_does_not_change_is_found(tmp_path: Path, changes: bool) -> None:
    """After a restart on another history of the log, a new incarnation makes a reader compare; without it, it errs."""
    first = write(tmp_path / "state", [b"0"])
    shutil.copytree(first.path, tmp_path / "copy")
    longer = write(first.path, [b"1"], 1)
    other = write(tmp_path / "copy", [b"x", b"y"], 2)
    directory = Directory(first.path)
    directory.lock()
    try:
        by_hand = ByHand(first.path)
        by_hand.publish(longer.moments[0])
        with Reader(first.path) as reader:
            assert look(reader) == (4, b"1")
            watch = reader.watch(start=3)
            assert len(watch.read()) == 2
            log = "log-1"
            content = (tmp_path / "copy" / log).read_bytes()
            with open(first.path / log, "r+b") as file:
                file.write(content)
            by_hand.publish(other.moments[1], incarnation=by_hand.incarnation + changes)
            if changes:
                assert (look(reader), reader.stats().rebuilt) == ((6, b"y"), 1)
                with pytest.raises(CompactedError):
                    watch.read(timeout=0)
            else:
                with pytest.raises(CorruptionError):
                    watch.read(timeout=0)
                with pytest.raises(CorruptionError):
                    reader.refresh()
    finally:
        directory.close()


def test_a_new_owner_goes_on_after_a_half_written_slot(written: Written) -> None:
    """An owner that was killed between any two stores is followed by the next one, whatever slot it left."""
    by_hand = ByHand(written.path)
    for stop in range(8):
        for at, _ in enumerate(by_hand.stores(written.moments[-1])):
            if at == stop:
                break
        with Reader(written.path) as reader:
            before = look(reader)
            with FastStateMachine(written.path) as machine:
                assert look(reader) == before
                machine.apply([(machine.last_applied().index + 1, 1, put(b"other", b""))])
                assert look(reader)[0] == before[0] + 1
                assert reader.stats().rebuilt == 0


# ---- any bytes ---------------------------------------------------------------------------------------

def test_any_bytes_are_no_danger(written: Written) -> None:
    """Whatever the file contains, a reader shows what is complete in the log, or raises a typed error; never more."""
    dice = random.Random(11)
    path = written.path / published.NAME
    sound = bytearray(path.read_bytes())
    for _ in range(300):
        content = bytearray(sound)
        for _ in range(dice.choice((1, 1, 3, 40))):
            content[dice.randrange(256)] = dice.randrange(256)
        if dice.random() < 0.3:  # by an attacker who knows the checksum
            slot = np.frombuffer(content, np.uint64, 8, 64 + 64 * dice.randrange(2))
            slot[dice.randrange(1, 7)] = dice.choice((0, 1, 96, 1 << 40, (1 << 64) - 1, dice.getrandbits(64)))
            slot[7] = checksum_of(slot)
        path.write_bytes(content)
        try:
            with Reader(written.path) as reader:
                index, color = look(reader)
                assert color in (b"5", None) or index < 12
                assert inside(reader).taken_up_to() <= written.moments[-1].end
        except FastsmError:
            pass


def test_the_page_of_formats_says_what_is_there(tmp_path: Path) -> None:
    """Magic, version, slots and checksum are where `docs/format.md` has them; numbers alternate between the slots."""
    with FastStateMachine(tmp_path) as machine:
        seen = set()
        for index in range(1, 6):
            machine.apply([(index, 1, put(b"color", b"%d" % index))])
            slots = read_page((tmp_path / published.NAME).read_bytes())
            newest = max(slots, key=lambda slot: slot["number"])
            assert (newest["identity"], newest["end"]) == (inside(machine).log.head.identity, inside(machine).log.end)
            assert (newest["applied index"], newest["applied term"]) == (index, 1)
            seen.add(newest["incarnation"])
        assert len(seen) == 1
    with FastStateMachine(tmp_path):
        slots = read_page((tmp_path / published.NAME).read_bytes())
        assert max(slots, key=lambda slot: slot["number"])["incarnation"] not in seen


def counts_in(incarnation: int) -> tuple[int, int]:
    """Return the counts of other states and of earlier ones. Both start anywhere, and wrap around."""
    return incarnation & 0x3FF, incarnation >> 10 & 0x3FF


@pytest.mark.parametrize("step", ["compact", "install", "reset"])
def test_the_page_of_formats_says_what_a_step_announces(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before CURRENT is replaced both logs are named, and the incarnation that belongs to the next one."""
    announced = []
    name_next = current.name_next

    def look(directory: Directory, old: Any, log: Any) -> None:
        announced.append(read_step((tmp_path / "state" / published.NAME).read_bytes()))
        assert announced[-1] is not None
        assert announced[-1][:2] == (old.head.identity, log.head.identity)
        name_next(directory, old, log)

    monkeypatch.setattr(current, "name_next", look)
    with FastStateMachine(tmp_path / "state", retain_entries=0) as machine:
        machine.apply([(1, 1, put(b"color", b"blue"))])
        before = max(read_page((tmp_path / "state" / published.NAME).read_bytes()), key=lambda slot: slot["number"])
        if step == "compact":
            machine.compact()
        elif step == "install":
            machine.write_snapshot(tmp_path / "snapshot")
            machine.install_snapshot(None, tmp_path / "snapshot")
        else:
            machine.clear()
        after = max(read_page((tmp_path / "state" / published.NAME).read_bytes()), key=lambda slot: slot["number"])
        assert announced == [(before["identity"], after["identity"], after["incarnation"])]
        steps = {"compact": (0, 0), "install": (1, 0), "reset": (0, 1)}[step]
        assert counts_in(after["incarnation"]) == tuple(
            (count + more) % 1024 for count, more in zip(counts_in(before["incarnation"]), steps, strict=True)
        )
        assert after["incarnation"] >> 20 == before["incarnation"] >> 20


# ---- power loss --------------------------------------------------------------------------------------

def test_after_a_power_loss_a_reader_shows_what_recovery_has(quiet: None) -> None:
    """Whatever a power loss left, even of the publication, a reader without an owner shows what recovery would find."""
    points: list[Point] = []
    dice = random.Random(5)

    def note(where: str) -> None:
        if dice.random() < 0.3:
            points.append(Point(platter, where))

    platter = Platter(note)
    less = 0
    with memory_directory() as root:
        with FastStateMachine(root / "state", _files=platter.files, auto_compact=False) as machine:
            for index in range(1, 120):
                machine.apply([(index, 1, put(b"%d" % (index % 7), os.urandom(dice.choice((10, 300, 5000)))))])
                if dice.random() < 0.1:
                    machine.flush()
                if index % 40 == 0:
                    machine.compact(index - 5)
                if dice.random() < 0.3:
                    points.append(Point(platter, "apply"))
        for number in range(400):
            point = dice.choice(points)
            path = root / f"lost-{number}"
            point.draw(dice).build(path)
            less += follow_after_power_loss(path)
            shutil.rmtree(path)
        platter.close()
    assert less >= 20, "the power never took anything"


def follow_after_power_loss(path: Path) -> bool:
    """Compares a reader before and after recovery; returns whether recovery found less than was published."""
    try:
        reader = Reader(path)
    except StorageError:
        return False  # there is no state yet
    with reader:
        shown = reader.last_applied(), dict(reader.items())
        page = path / published.NAME
        said = published.newest_in(page.read_bytes()) if page.exists() else None
        with FastStateMachine(path) as machine:
            assert shown == (machine.last_applied(), dict(machine.items()))
            assert (reader.refresh(), dict(reader.items())) == shown
            lost = said is not None and said.applied_index > shown[0].index
            assert reader.stats().rebuilt <= lost  # then the state has moved to another generation
            return lost


def test_a_run_of_the_machine_whose_number_cannot_be_read_may_have_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers are assumed to be alive if the owner has no descriptor for reading which run of the machine this is."""
    before = published.Published(2, 7 << 32, 1, 96, 1, 1, 1)
    monkeypatch.setattr(published, "boot_number", lambda: 8)
    assert not published.may_have_readers(before)
    monkeypatch.setattr(published, "boot_number", lambda: 0)
    assert published.may_have_readers(before)
