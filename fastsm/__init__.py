"""fastsm: a Raft state machine for Python, in which the log is the store.

Committed entries go in, reads come out, and applied entries survive. The reading order of the source, from bytes to
files to memory to the machine; each module imports only modules listed before it:

    errors, units           every error; numbers for people
    arguments               arguments of calls, converted, or refused with advice
    log_lines, streams      log lines that any handler can write; standard streams that are closed
    libraries               other libraries, imported when they are first needed
    types                   the small values that go in and out
    trait                   StateMachine, the twenty methods that a Raft library needs
    background              calls on threads of their own, also to keep signal handlers from interrupting them
    event_loops             the same for coroutines
    long_work               work without the GIL, while the caller waits and serves signals
    disk/                   byte layouts, and the seam to the system
        hashing             SipHash for the table, XXH64 for the frames
        format              the disk formats: offsets, limits, frames and records
        headers, snapshot_header  the headers of files
        descriptors, mapping  open files, their locks and writes; files mapped into memory
        parts               frames whose large values are written without being copied
        forks               what a forked child leaves to its parent
        files               directories: the seam to the system
        torn_tail           what follows the last valid frame: torn, or the proof that durable bytes were lost
        published           what an owner tells readers in other processes
        base                the snapshot file that a log is stacked on
        walk                the walk over the records of base and log
    named                   named tuples that the garbage collector need not track
    distinct                which of many keys are duplicates
    command, columns        the bytes that Raft carries; many puts made from columns
    answers, answering      the answers of entries; the commands that have answers
    procedures              functions of the embedder that are commands, and their rules
    clock                   for hosts: when a tick is worth proposing
    lookup/                 indexes in memory
        table, terms, dead  from keys to places; from entries to terms; which records were superseded
        deadlines           what is due next
        sorting             records, sorted by key
        tree, tree_changes  places in the order of their keys, in a tree that readers may hold; its changes
        order, ranges       the keys in their order, kept up to date; reads of ranges, as of one moment
        index               table, terms, dead map and order: everything that points into base and log
    generation/             a base and a log
        names               its file names, and which files of these names this library made
        recovery            what a log contains, what is torn and what is corrupt
        framefile           frames in a mapped file: append, sync, cut; used for logs and the journal's segments
        log                 a file of frames on top of a base: recover, copy
        verification        every byte against its checksum, now or in the background
        saved_order         the order of the keys, as a section of the saved table
        saved_table         the index in a file, for opening without reading the log
        loaded_table        that file, mapped back into memory as the index
        unfinished          a directory that a tool is filling counts as empty until it is complete
        steps               steps along a log, from one change to the next
        changes, watch      the log as a stream of changes; watches on threads and event loops
        current             CURRENT, and the step from one generation to the next on disk
    snapshot/               a snapshot's file
        codec, flat         Zstandard, within limits; the state in flat form, checked
        file                reading the file
        writer              writing the file, completely or not at all
        receiver            a snapshot that arrives in pieces
        capture             the state as of any entry, held still: what a snapshot contains
        incoming            a snapshot's file, copied in as the next base
        model               the file made from docs/format.md alone, for MemoryStateMachine
    core/                   the state, and what changes it
        awaited             tickets of callers that wait for an entry to be applied
        watchers            watches that wait for a change
        frozen              the present state, held still: iterators, columns
        status, state       whether a call may go on, and the epoch; the applied state, and every way to read it
        ordered, timed      reads in the order of the keys: scans, counts, iterators; clock and deadlines
        scratch             memory for what judging a chunk makes
        view, ranging       the state as commands in a chunk see it; ranges of it
        expiring, tx        the state as ticks see it; as procedures see it
        judging             the outcome of each entry of a chunk
        chunk, turns        a chunk being applied; one writer at a time
        group_commit        one sync for all flushes that overlap
        hard_state          what is applied, written and durable; the latest snapshot's metadata
        engine              apply, and the step to the next generation in memory
        jobs, policy        running snapshots and compactions; when compaction is automatic
        generations         the step to the next base and log, and the end of the last log
        verifying           checks of every byte, on demand and in the background
        snapshots           taking a snapshot
        installing          a snapshot becomes the state
        compaction          the log becomes a base
        batches             a thread that answers many coroutines at a time
        waiting             waiting for an entry to be applied, on threads and event loops
        matching, watching  which watches a change concerns; the thread that tells them
        coroutine_order     the order of asynchronous calls
        moving              a recovered state continues in another generation, if its log must not be cut
        opening, statistics a machine's options, and opening it; its statistics
    journal/                a Raft library's own log
        format, entries     its disk format; where each entry is
        segment, segments   one of its files; how its files are created and removed
        recovery            its files, read back
        journal             entries, term and vote, in files that are cut at both ends
        engine              the same for many threads: one writer at a time, one sync for all
        checking            every byte of it against its checksum
    raft_log                RaftLog
    machine                 FastStateMachine
    reading/                the state as another process sees it
        opening             a state that its owner may keep changing, opened from outside
        frames              the frames of a log that another process writes, as far as they are published
        following           taking what was published since, frame by frame
        news                when there is something to take, and from which file
        change_source       following frames without an index, for watches
        watching            how watches wait
        reader              Reader
    model/                  the same state machine on a dict, for tests and as a specification
        ids                 the ids of entries: terms, and which ids agree
        tx, judging         what an entry writes; the outcome of each entry
        waiting, watch      callers that wait for an entry; the list of changes, from a position on
        machine             MemoryStateMachine
    integrations            Raft libraries that run on fastsm; imported only when used
    tools/                  what people and the command line use
        demo_history, demo  the main use, with real input
        records             the records of a file, one by one
        raft_logs           a Raft log, examined from outside
        inspection          a directory or a snapshot, examined from outside
        new_state           a state that is made completely or not at all
        line_entries        lines of a dump, as entries
        json_lines          dump and load
        repair              salvaging a damaged directory
        benchmark           how fast fastsm is on the user's machine
    cli                     the command ``fastsm``
    testing                 a conformance suite for any StateMachine
"""

import logging as _logging

try:
    import fastsm.core.engine as _engine  # noqa: F401  # is this package built?
except ModuleNotFoundError as _error:
    if _error.name is None or not _error.name.startswith("fastsm."):
        raise
    raise ImportError(
        f"the fastsm package in {__path__[0]} is not built: it is a source checkout that hides the installed "
        "package. Run from another folder, use the commands `fastsm` and `pytest` instead of `python -m`, "
        'or build in place with `pip install -e ".[cli,test]"`.'
    ) from _error

from fastsm.answering import (
    absent,
    add,
    call,
    delete_prefix,
    delete_range,
    exists,
    forget,
    modified_at,
    once,
    open_session,
    read,
    tick,
    touch,
    transaction,
    value_is,
)
from fastsm.answers import MAX_ANSWER_SIZE
from fastsm.clock import Clock
from fastsm.columns import put_many
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
)
from fastsm.errors import (
    ChecksumMismatchError,
    ClockJumpError,
    CommandError,
    CompactedError,
    CorruptionError,
    FastsmError,
    FormatVersionError,
    LockedError,
    NotRunningError,
    OrderError,
    ProcedureError,
    ReadOnlyError,
    ReentryError,
    SnapshotError,
    SnapshotFormatError,
    SnapshotRangeError,
    StaleSnapshotError,
    StorageError,
    UnknownCommandError,
)
from fastsm.generation.watch import Watch
from fastsm.log_lines import EncodableLines as _EncodableLines
from fastsm.machine import FastStateMachine
from fastsm.model.machine import MemoryStateMachine
from fastsm.procedures import Abort, procedure
from fastsm.raft_log import RaftLog, RaftLogStats
from fastsm.reading.reader import Reader, ReaderStats
from fastsm.snapshot.file import Snapshot, open_snapshot
from fastsm.snapshot.receiver import SnapshotReceiver
from fastsm.trait import StateMachine
from fastsm.types import Answer, Change, Entry, LogId, Position, ScanResult, SnapshotMetadata, Stats

# A library must not write to standard error by itself: hosts that want to see its messages set up logging.
_logging.getLogger("fastsm").addHandler(_logging.NullHandler())
_logging.getLogger("fastsm").addFilter(_EncodableLines())

__version__ = "0.1.0.dev0"

__all__ = [
    "MAX_ANSWER_SIZE",
    "MAX_COMMAND_SIZE",
    "MAX_KEY_SIZE",
    "MAX_VALUE_SIZE",
    "Abort",
    "Answer",
    "Change",
    "ChecksumMismatchError",
    "Clock",
    "ClockJumpError",
    "CommandError",
    "CompactedError",
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
    "Position",
    "ProcedureError",
    "RaftLog",
    "RaftLogStats",
    "ReadOnlyError",
    "Reader",
    "ReaderStats",
    "ReentryError",
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
    "Watch",
    "absent",
    "add",
    "batch",
    "call",
    "check",
    "compare_and_swap",
    "config",
    "decode",
    "delete",
    "delete_prefix",
    "delete_range",
    "exists",
    "forget",
    "modified_at",
    "noop",
    "once",
    "open_session",
    "open_snapshot",
    "procedure",
    "put",
    "put_many",
    "read",
    "tick",
    "touch",
    "transaction",
    "value_is",
]
