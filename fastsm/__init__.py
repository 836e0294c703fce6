"""fastsm: the Raft state machine for Python. The log is the store.

Committed entries go in, reads come out, and what was applied survives. Reading order of the source, from
bytes to files to memory to the machine; each module knows only those before it:

    errors, units       what can go wrong; numbers for people
    types               the small values that go in and out
    trait               StateMachine, the twenty methods that a Raft library needs
    hashing             SipHash for the table, XXH64 for the frames
    command             the bytes that Raft carries
    format              the disk formats: every magic, version, offset and limit
    mapping, files      the seam to the system
    codec, snapshot     Zstandard, within bounds; a snapshot's file, read
    beside              a call on a thread of its own
    snapshot_writer     a snapshot's file, written whole or not at all
    receiver            a snapshot that arrives in pieces
    table, terms, dead  from keys to places; from entries to terms; which records are not the newest of their key
    base                a snapshot that a log starts behind
    recovery            what a log holds, what is torn and what is corrupt
    log, walk           frames in a mapped file: append, sync; the way over the records of base and log
    journal_format      the disk format of a Raft library's own log
    journal_entries     where each entry of it lies
    segment, journal    that log: entries, term and vote, in files that are cut at both ends
    index               table, terms and dead map: what leads into base and log
    saved_table         the index in a file, for opening without reading the log
    capture             the state as of any entry, held still: what a snapshot holds
    frozen              the present state, held still: iterators, scans, columns
    state               what was applied, and every way to read it
    chunk, turns        what is being applied; one writer at a time
    group_commit        one sync for all flushes that overlap
    engine              apply, hard state, the step to a next generation in memory
    verification        every byte against its checksum, now or in the background
    generation          CURRENT, and the step from one generation to the next on disk
    jobs, policy        work beside everything else; when compaction comes by itself
    incoming            a snapshot's file on its way in
    snapshots           write, install, compact
    coroutines          the order of asynchronous calls
    machine             FastStateMachine
    model_snapshot      snapshots by the page of formats alone
    memory              MemoryStateMachine, the model
    integrations        Raft libraries that run on fastsm; imported only when used
    demo_history, demo  the main job, on real input
    records             what files hold, one by one
    inspection          a directory or a snapshot, looked at from outside
    new_directory       a directory that is there whole or not at all
    json_lines          dump and load
    repair              what is left of a damaged directory
    benchmark           how fast it is on a user's machine
    cli                 the command ``fastsm``
    testing             a conformance suite for any StateMachine
"""

import logging as _logging

try:
    import fastsm.engine as _engine  # noqa: F401  # is this package built?
except ModuleNotFoundError as _error:
    if _error.name is None or not _error.name.startswith("fastsm."):
        raise
    raise ImportError(
        f"the fastsm package in {__path__[0]} is not built: it is a source checkout that hides the installed "
        "package. Run from another folder, use the commands `fastsm` and `pytest` instead of `python -m`, "
        'or build in place with `pip install -e ".[cli,test]"`.'
    ) from _error

from fastsm.command import (
    MAX_COMMAND_SIZE,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    batch,
    check,
    compare_and_swap,
    config,
    decode,
    delete,
    noop,
    put,
    put_many,
)
from fastsm.errors import (
    ChecksumMismatchError,
    CommandError,
    CorruptionError,
    FastsmError,
    FormatVersionError,
    LockedError,
    NotRunningError,
    OrderError,
    ReadOnlyError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotRangeError,
    StaleSnapshotError,
    StorageError,
    UnknownCommandError,
)
from fastsm.machine import FastStateMachine
from fastsm.memory import MemoryStateMachine
from fastsm.receiver import SnapshotReceiver
from fastsm.snapshot import Snapshot, open_snapshot
from fastsm.trait import StateMachine
from fastsm.types import Entry, LogId, ScanResult, SnapshotMetadata, Stats

# A library says nothing on its own: hosts that want to hear of recoveries and torn tails set up logging.
_logging.getLogger("fastsm").addHandler(_logging.NullHandler())

__version__ = "0.1.0.dev0"

__all__ = [
    "MAX_COMMAND_SIZE",
    "MAX_KEY_SIZE",
    "MAX_VALUE_SIZE",
    "ChecksumMismatchError",
    "CommandError",
    "CorruptionError",
    "Entry",
    "FastStateMachine",
    "FastsmError",
    "FormatVersionError",
    "LockedError",
    "LogId",
    "MemoryStateMachine",
    "NotRunningError",
    "OrderError",
    "ReadOnlyError",
    "ScanResult",
    "Snapshot",
    "SnapshotError",
    "SnapshotFormatError",
    "SnapshotMetadata",
    "SnapshotRangeError",
    "SnapshotReceiver",
    "StaleSnapshotError",
    "StateMachine",
    "Stats",
    "StorageError",
    "UnknownCommandError",
    "batch",
    "check",
    "compare_and_swap",
    "config",
    "decode",
    "delete",
    "noop",
    "open_snapshot",
    "put",
    "put_many",
]
