"""The rows of the results: what is measured, what it is compared with, and the target."""

from __future__ import annotations

from typing import NamedTuple

from bench.harness import Result


class Row(NamedTuple):
    work: str
    base: str
    target: float | None  # at most
    unit: str = "ratio"


ROWS = {
    "get.10k.same": Row("get, 10 thousand keys, same objects", "dict", 1.3),
    "get.10k.fresh": Row("get, 10 thousand keys, fresh", "dict", 0.9),
    "get.1m.same": Row("get, 1 million keys, same objects", "dict", 0.9),
    "get.1m.fresh": Row("get, 1 million keys, fresh", "dict", 0.6),
    "get.1m.miss": Row("get of an absent key, 1 million, fresh", "dict", 0.55),
    "get_many.1m": Row("get_many(1000) of 1 million, fresh", "list(map(dict.get, keys))", 0.15),
    "get_view.4k": Row("get_view of 4 KiB", "dict.get", 2),
    "get_view.1m": Row("get_view of 1 MiB", "dict.get", 2),
    "apply.1": Row("apply, chunks of 1", "dict", 0.8),
    "apply.10": Row("apply, chunks of 10", "dict", 0.45),
    "apply.100": Row("apply, chunks of 100", "dict", 0.3),
    "apply.1000": Row("apply, chunks of 1,000", "dict", 0.25),
    "apply.longest": Row("apply while the table grows from 1 thousand to 10 million keys: longest call, a "
                         "thousand entries, own time", "", 5, "ms"),
    "put": Row("put", "", 150, "ns"),
    "put_many": Row("put_many, a pair", "", 25, "ns"),
    "put_apply.100": Row("put and apply(100) together", "dict", 0.7),
    "apply_chunk.1": Row("await apply_chunk of 1, more than apply of 1", "", 5, "us"),
    "apply.4k": Row("apply of 4 KiB values, chunks of 10", "a bare write of as many bytes", 1.5),
    "apply.1m": Row("apply of 1 MiB values", "a bare write of as many bytes", 1.5),
    "flush.100": Row("apply 100, then flush", "a bare growing write + fdatasync", 0.8),
    "load": Row("load 1 million by apply, then one flush", "dict, no flush", 0.8),
    "open.background": Row('open 1 million after a clean close, "background"', "", 5, "ms"),
    "open.full": Row('the same, "full"', "reading and hashing the files", 1.5),
    "open.killed": Row("open 1 million after kill -9, all of it in the log", "dict(zip(...)) in memory", 1.5),
    "open.killed.base": Row("the same with a base and 64 MiB of log after it", "dict(zip(...)) in memory", 0.7),
    "snapshot": Row("snapshot of 1 million, BLAKE3 and fsync included", "bare write + fsync", 2),
    "snapshot.reader.p9999": Row("a reader meanwhile: 99.99th percentile", "the same without", 2),
    "snapshot.reader.gap": Row("a reader meanwhile: longest gap", "the same without", 2),
    # Without a verdict: where one of the two above misses its target, 1.1 here would be good enough instead.
    "snapshot.reader.c.p9999": Row("the same percentile", "a C thread that hashes and writes as much", None),
    "snapshot.reader.c.gap": Row("the same gap", "a C thread that hashes and writes as much", None),
    "install": Row("install of that snapshot", "bare write + fsync", 2.5),
    "memory.private.1m": Row("private memory a key at 1 million", "", 18, "bytes"),
    "memory.private.worst": Row("the same, worst of 20 sizes up to 10 million", "", 24, "bytes"),
    "memory.mapped": Row("mapped bytes a key at 1 million", "", 140, "bytes"),
    "disk.1000": Row("disk a key after a clean close, chunks of 1,000", "", 160, "bytes"),
    "disk.1": Row("the same, chunks of 1", "", 200, "bytes"),
    "busy.snapshot": Row("snapshot of 1 million next to a thread that reads in a loop", "bare write + fsync", 2),
    "busy.install": Row("install of a million keys, next to that thread", "the same with nobody else", 1.5),
    "busy.compact": Row("compaction of a million keys, next to that thread", "the same with nobody else", 1.5),
    "busy.open_full": Row('opening a million keys, "full", next to that thread', "the same with nobody else", 1.5),
    "busy.verify": Row("verify of a million keys, next to that thread", "the same with nobody else", 1.5),
    "busy.columns": Row("columns of a million keys, next to that thread", "the same with nobody else", 1.5),
    "answer.add": Row("add", "compare_and_swap", 1.2),
    "answer.transaction": Row("transaction of one condition and two puts", "batch of two puts", 1.5),
    "answer.once": Row("once(put)", "put", 1.5),
    "answer.procedure": Row("a procedure of one get and one put, chunks of 100",
                            "a pickled method over a dict, logged in a buffered file", 1.2),
    "answer.session": Row("private memory a session", "", 40, "bytes"),
    "time.put": Row("put with a deadline", "put", 1.25),
    "time.tick": Row("tick with 1 million deadlines, none due, more than a noop", "", 1, "us"),
    "time.tick.due": Row("tick with 10 thousand due", "", 10, "ms"),
    "time.memory": Row("resident memory a deadline, overwrites included", "", 24, "bytes"),
    "scan.100": Row("scan(limit=100) from any of 1 million keys", "", 40, "us"),
    "scan.insert.random": Row("a new key and a scan in turns, at 1 million keys", "the same at 10 thousand", 2),
    "scan.insert.rising": Row("the same with the greatest key, at 1 million keys", "the same at 10 thousand", 2),
    "scan.insert.falling": Row("the same with the least key, at 1 million keys", "the same at 10 thousand", 2),
    "scan.insert.gap": Row("the same with all keys in one gap, at 1 million keys", "the same at 10 thousand", 2),
    "scan.insert": Row("a new key, then a scan(limit=100) from there", "", None, "us"),
    "count.100k": Row("count of 100 thousand of 1 million keys", "", None, "ms"),
    "delete_range.100k": Row("delete_range of 100 thousand of 1 million keys, then a scan, a key", "", None, "ns"),
    "delete_prefix": Row("delete_prefix of 1 million keys, a key", "the same of 10 thousand", 2),
    "scan.deleted.first": Row("the first scan after it, a deleted key", "the same of 10 thousand", 2),
    "scan.deleted": Row("scans after that one", "the same of 10 thousand", 2),
    "reader.refresh": Row("Reader: refresh with nothing new", "", 150, "ns"),
    "reader.get": Row("Reader: get, same objects", "", None, "ns"),
    "reader.owner_get": Row("the owner's get meanwhile", "", None, "ns"),
    "reader.open": Row("Reader: opening, no saved table", "", None, "ms"),
    "reader.open_saved": Row("Reader: opening from a saved table", "", 10, "ms"),
    "reader.wait": Row("Reader: applied to seen by wait, 99th percentile", "", 1.5, "ms"),
    "reader.watch": Row("Reader: applied to told by a watch, 99th percentile", "", 1.5, "ms"),
    "reader.catch_up": Row("Reader: catching up, an entry", "", None, "ns"),
    "reader.watch_read": Row("Reader: a change by read(1024) of a watch", "", None, "ns"),
    "watch.read": Row("a change by read(1024), values of 32 bytes", "", 500, "ns"),
    "watch.for": Row("a change by for, values of 32 bytes", "", 1000, "ns"),
    "watch.idle": Row("apply, chunks of 100, next to 1,000 watches that wait", "the same without", 1.05),
    "watch.wake": Row("from apply to a waiting read: 99th percentile", "", 1.5, "ms"),
    "open.ordered": Row("open 1 million that were in order, and scan", "", 10, "ms"),
    "open.unordered": Row("open 1 million that were not, without a scan", "", None, "ms"),
    "order.build.random": Row("the order of random keys, built: seconds a million", "", 0.5, "s"),
    "order.build.kilobyte": Row("the same, keys that share a kilobyte", "", 3, "s"),
    "memory.order": Row("memory of the order, a key", "", 12, "bytes"),
    "apply.ordered": Row("apply, chunks of 1,000, with the order in use", "apply without", 1.3),
    "raft_log.sync.100": Row("RaftLog: append 100 of 128 bytes, sync", "a bare growing write + fdatasync", 0.8),
    "raft_log.sync.1": Row("RaftLog: append 1 of 128 bytes, sync", "a bare growing write + fdatasync", 1.1),
    "raft_log.sync.1m": Row("RaftLog: append 1 of 1 MiB, sync", "a bare growing write + fdatasync", 1.1),
    "raft_log.open": Row("RaftLog: open 1 million entries", "reading and hashing the files", 1.5),
    "raft_log.read": Row("RaftLog: read 1 million entries", "list(map(Entry._make, tuples))", 0.5),
    "raft_log.memory": Row("RaftLog: memory an entry", "", 10, "bytes"),
    "entry_term": Row("entry_term", "", 40, "ns"),
    "entry_terms": Row("entry_terms of a million ids, an id", "", 15, "ns"),
}  # fmt: skip


def verdict(result: Result) -> str:
    """Return the target and whether the median reaches it, or an empty string for a row without a target."""
    row = ROWS.get(result.row)
    if row is None or row.target is None or result.who != "fastsm":
        return ""
    return f"≤ {row.target:g}: {'reached' if result.median <= row.target else 'MISSED'}"
