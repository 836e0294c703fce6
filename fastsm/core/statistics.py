"""Statistics of a machine at one moment."""

from __future__ import annotations

from fastsm.core.engine import Engine
from fastsm.core.generations import Generations
from fastsm.types import LogId, Recovery, Stats


def stats_of(engine: Engine, generations: Generations, recovery: Recovery) -> Stats:
    """Returns what ``stats()`` returns: all figures of the state are from one moment. O(1)."""
    (
        log, table_bytes, table_load, keys, live_bytes, dead_bytes, log_bytes, term_runs, applied_index,
        applied_term, durable_index, durable_term, verified, sync_count, sync_seconds,
    ) = engine._figures()  # fmt: skip
    return Stats(
        keys=keys,
        live_bytes=live_bytes,
        dead_bytes=dead_bytes,
        pinned_bytes=generations.pinned_bytes(log),
        log_bytes=log_bytes,
        base_bytes=log.base_bytes,
        generation=log.head.generation,
        base=LogId(log.head.base_index, log.head.base_term),
        table_bytes=table_bytes,
        table_load=table_load,
        term_runs=term_runs,
        last_applied=LogId(applied_index, applied_term),
        durable=LogId(durable_index, durable_term),
        verified=verified,
        flush_count=sync_count,
        flush_seconds=sync_seconds,
        recovery=recovery,
    )
