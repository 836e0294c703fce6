"""The demo: its history, its model, and the mistakes that it notices."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import fastsm
from fastsm.tools import demo as demos
from fastsm.tools.demo import DemoError, MismatchError, Progress, run_demo
from fastsm.tools.demo_history import Model, digest, file_names, history, read_file
from fastsm.types import Batch, CompareAndSwap, Config, Delete, Noop, Put

CHUNK = 20


@pytest.fixture
def source(tmp_path):
    """Provide a folder of small files, some of them in subfolders."""
    folder = tmp_path / "source"
    for number in range(60):
        path = folder / f"part{number % 3}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"line %d\n" % number * (number * number))
    (folder / "part0" / "file0.py~").write_bytes(b"named as the history names its copies")
    (folder / os.fsdecode(b"not utf-8 \xff")).write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def files(source):
    return {name: read_file(str(source), name) for name in file_names(str(source))}


def at_start_of(step, action):
    """Return a reporter that calls `action` when a step begins."""
    done = []

    def report(now: Progress) -> None:
        if now.step == step and now.done == 0 and not done:
            done.append(now)
            action()

    return report


# ---- files and history -------------------------------------------------------------------------------


def test_only_regular_files_are_taken_and_no_caches(tmp_path):
    """Symlinks, FIFOs, __pycache__ and site-packages are skipped; paths are relative and sorted."""
    for name in ("b.py", "a/c.py", "a/__pycache__/c.pyc", "site-packages/x.py", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "link.py").symlink_to(tmp_path / "b.py")
    (tmp_path / "folder-link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    assert file_names(str(tmp_path)) == [b"a/.hidden", b"a/c.py", b"b.py"]


def test_the_digest_sees_names_contents_and_their_border():
    """Files with different names, contents, or borders between them have different digests."""
    some = [{}, {b"a": b""}, {b"a": b"b"}, {b"ab": b""}, {b"a": b"", b"b": b""}]
    assert len({digest(files) for files in some}) == len(some)


def test_the_history_is_a_function_of_files_and_seed(files):
    """Equal files in any order and equal seeds give equal entries; other seeds give other entries."""
    entries = list(history(files, 7))
    assert list(history(dict(reversed(files.items())), 7)) == entries
    assert list(history(files, 8)) != entries


@pytest.mark.parametrize("seed", range(5))
def test_the_history_ends_with_every_file_as_it_is(files, seed):
    """Replays by the demo's model and by MemoryStateMachine agree on every result, and end with the files."""
    model, memory = Model(), fastsm.MemoryStateMachine()
    entries = list(history(files, seed))
    assert [model.apply(entry) for entry in entries] == memory.apply(entries)
    assert model.values == files == dict(memory.items())
    assert model.membership == memory.membership()
    assert model.applied == memory.last_applied()


def test_the_history_has_every_kind_of_entry(files):
    """Indexes rise by one, each new term begins with a noop, and some swaps and batches match, others not."""
    entries = list(history(files, 3))
    assert [entry.index for entry in entries] == list(range(1, len(entries) + 1))
    model = Model()
    seen = set()
    before = 0
    for entry in entries:
        command = fastsm.decode(entry.command)
        assert entry.term >= before
        assert isinstance(command, Noop) == (entry.term > before)
        before = entry.term
        seen.add((type(command), model.apply(entry)))
    assert {(kind, True) for kind in (Put, Delete, CompareAndSwap, Batch, Noop, Config)} <= seen
    assert {(CompareAndSwap, False), (Batch, False)} <= seen
    assert len({entry.term for entry in entries}) > 3


def test_a_batch_that_does_not_match_leaves_the_model_as_it_was():
    """Members of a batch before the one that does not match are undone, including new keys."""
    model = Model({b"a": b"1"})
    wrong = fastsm.compare_and_swap(b"a", b"1", b"3")
    batch = fastsm.batch([fastsm.put(b"a", b"2"), fastsm.put(b"b", b"2"), fastsm.delete(b"c"), wrong])
    assert model.apply(fastsm.Entry(1, 1, batch)) is False
    assert model.values == {b"a": b"1"}


# ---- the run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_demo_recovers_at_least_what_was_acknowledged(source, files, seed):
    """The acknowledged chunks of a killed child are recovered, and the remaining entries restore every file."""
    result = run_demo(source=str(source), seed=seed, chunk=CHUNK)
    assert result.files == len(files)
    assert result.file_bytes == sum(map(len, files.values()))
    assert 0 < result.acknowledged.index <= result.recovered.index <= result.entries
    assert result.flushed <= result.acknowledged
    assert result.child.entries == result.acknowledged.index
    assert result.recovered.index + result.parent.entries == result.entries
    assert result.recovery.frames >= result.recovered.index // CHUNK
    assert not result.recovery.clean
    assert result.reopening.clean


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_any_size_of_chunk_will_do(source, chunk):
    """The demo works with chunks of one entry, of a size that leaves a remainder, and of everything."""
    result = run_demo(source=str(source), seed=1, chunk=chunk, flush_every=50)
    assert result.recovered.index % chunk == 0 or result.recovered.index == result.entries


def test_a_named_directory_is_kept_with_the_files_in_it(source, files, tmp_path):
    """A named directory can be opened afterwards, and holds the contents of the files."""
    result = run_demo(str(tmp_path / "kept"), source=str(source), chunk=CHUNK)
    with fastsm.FastStateMachine(tmp_path / "kept") as m:
        assert m.last_applied().index == result.entries
        assert {name: m.get(name) for name in files} == files
        assert len(m) == len(files)


def test_a_temporary_directory_is_removed(source, tmp_path, monkeypatch):
    """The temporary directory is removed, whether the demo succeeds or fails."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    run_demo(source=str(source), chunk=CHUNK)
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(demos, "history", lambda files, seed: iter(()))
    with pytest.raises(DemoError):
        run_demo(source=str(source), chunk=CHUNK)
    assert list(scratch.iterdir()) == []


def test_each_step_is_reported_from_its_start_to_its_outcome(source):
    """Steps come in order, their counts never fall and end at the total, and the last has the outcome."""
    seen = []
    run_demo(source=str(source), chunk=CHUNK, report=seen.append)
    steps = list(dict.fromkeys(now.step for now in seen))
    assert steps == ["read", "child", "recover", "compare", "rest", "reopen", "verify"]
    for step in steps:
        reports = [now for now in seen if now.step == step]
        assert [now.done for now in reports] == sorted(now.done for now in reports)
        assert [now.outcome is not None for now in reports] == [False] * (len(reports) - 1) + [True]
        assert step == "child" or reports[-1].done == reports[-1].total


# ---- failures ----------------------------------------------------------------------------------------


def test_a_directory_in_use_is_refused(source, tmp_path):
    """A directory that is not empty is refused and left alone."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_bytes(b"1")
    with pytest.raises(DemoError, match="not empty"):
        run_demo(str(tmp_path / "used"), source=str(source))
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["precious"]


def test_a_folder_without_files_is_refused(tmp_path):
    """A folder without files is refused."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DemoError, match="no files there"):
        run_demo(source=str(tmp_path / "empty"))


def test_a_value_that_differs_from_the_model_is_found(source, monkeypatch):
    """The demo notices if its model, here one that accepts every compare-and-swap, differs from the state machine."""
    honest = Model.apply

    def careless(model, entry):
        command = fastsm.decode(entry.command)
        if isinstance(command, CompareAndSwap) and command.value is not None:
            entry = entry._replace(command=fastsm.put(command.key, command.value))
        return honest(model, entry)

    monkeypatch.setattr(Model, "apply", careless)
    with pytest.raises(MismatchError, match=r"recovered at entry|the list of results"):
        run_demo(source=str(source), chunk=CHUNK)


def test_a_key_too_many_is_found(source, tmp_path):
    """A key that no entry wrote is noticed, although every key of the model has its value."""
    place = tmp_path / "state"

    def add_a_key_in_a_whole_chunk():
        with fastsm.FastStateMachine(place) as machine:
            index, term = machine.last_applied()
            entries = [(index + 1, term, fastsm.put(b"stranger", b""))]
            machine.apply(entries + [(index + i, term, fastsm.noop()) for i in range(2, CHUNK + 1)])

    report = at_start_of("recover", add_a_key_in_a_whole_chunk)
    with pytest.raises(MismatchError, match=r"recovered at entry .*: "):
        run_demo(str(place), source=str(source), chunk=CHUNK, report=report)


def test_part_of_a_chunk_is_found(source, tmp_path):
    """A recovered state that ends inside a chunk is noticed."""
    place = tmp_path / "state"

    def add_an_entry():
        with fastsm.FastStateMachine(place) as machine:
            index, term = machine.last_applied()
            machine.apply([(index + 1, term, fastsm.noop())])

    with pytest.raises(MismatchError, match="not the end of a chunk"):
        run_demo(str(place), source=str(source), chunk=CHUNK, report=at_start_of("recover", add_an_entry))


def test_lost_entries_are_found(source, tmp_path):
    """An empty directory is noticed after entries were acknowledged, flushed or not."""
    place = tmp_path / "state"
    lose = at_start_of("recover", lambda: shutil.rmtree(place))
    with pytest.raises(MismatchError, match="was acknowledged, but only 0 are recovered"):
        run_demo(str(place), source=str(source), chunk=CHUNK, flush_every=10**6, report=lose)
    shutil.rmtree(place)
    lose = at_start_of("recover", lambda: shutil.rmtree(place))
    with pytest.raises(fastsm.CorruptionError, match="expect_applied"):
        run_demo(str(place), source=str(source), chunk=CHUNK, flush_every=1, report=lose)


def test_a_file_that_differs_at_the_end_is_found(source):
    """The last step compares the state with the files on disk, byte for byte, and reports where they differ."""
    victim = source / "part1" / "file31.py"

    def change():
        content = bytearray(victim.read_bytes())
        content[100] ^= 1
        victim.write_bytes(content)

    with pytest.raises(MismatchError, match=r"part1/file31.py.*differ from offset 100$"):
        run_demo(source=str(source), chunk=CHUNK, report=at_start_of("verify", change))


def test_files_that_change_while_they_are_read_are_told(source):
    """If the child reads other files than its parent, the error says so, and is not a `MismatchError`."""
    change = at_start_of("child", lambda: (source / "part1" / "file31.py").write_bytes(b"new"))
    with pytest.raises(DemoError, match="files there changed") as caught:
        run_demo(source=str(source), chunk=CHUNK, report=change)
    assert not isinstance(caught.value, MismatchError)


def test_why_the_child_ended_is_told(source, tmp_path):
    """If the child cannot open its directory, the parent's error says so."""
    place = tmp_path / "state"
    with contextlib.ExitStack() as stack:
        hold = at_start_of("child", lambda: stack.enter_context(fastsm.FastStateMachine(place)))
        with pytest.raises(DemoError, match=r"ended by itself: .*already open"):
            run_demo(str(place), source=str(source), chunk=CHUNK, report=hold)


def test_an_interrupt_leaves_no_child(source, tmp_path):
    """If the parent is interrupted, the child is dead on return, and its lock is released."""
    place = tmp_path / "state"

    def interrupt(now: Progress) -> None:
        if now.step == "child" and now.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(str(place), source=str(source), chunk=CHUNK, report=interrupt)
    with fastsm.FastStateMachine(place) as machine:
        assert machine.last_applied().index >= CHUNK


def test_the_child_imports_what_its_parent_did(source, tmp_path, monkeypatch):
    """The child imports neither a fastsm nor a json of the current folder."""
    (tmp_path / "fastsm").mkdir()
    (tmp_path / "fastsm" / "__init__.py").write_text("raise SystemExit('the wrong fastsm')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert run_demo(source=str(source), chunk=CHUNK).files > 0


def test_the_standard_library_is_found():
    """By default the files are those of the running Python's standard library."""
    assert Path(demos.standard_library(), "os.py").samefile(sys.modules["os"].__file__)


@pytest.mark.parametrize("options", [{"chunk": 0}, {"flush_every": 0}])
def test_sizes_below_one_are_refused(source, options):
    """Sizes below one, such as a chunk without entries, are refused."""
    with pytest.raises(ValueError, match="at least 1"):
        run_demo(source=str(source), **options)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (102_273_533, "102.3 MB"), (5e9, "5.00 GB")]
)
def test_sizes_read_well(size, text):
    """Sizes are shown in decimal units."""
    assert demos.size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ns"), (1.2e-6, "1.2 µs"), (0.03, "30.0 ms"), (0.351, "351 ms"), (2.94, "2.9 s")]
)
def test_times_read_well(seconds, text):
    """Times are shown with three digits and a unit."""
    assert demos.time_text(seconds) == text
