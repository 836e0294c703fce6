"""The only module through which tests reach private names, so that a renamed one is changed in one place."""

from __future__ import annotations

from typing import Any

# Grouped by object, each without its leading underscore.
NAMES = frozenset({
    # FastStateMachine: the check of its invariants, and its parts
    "check", "log", "index", "table", "terms", "turns", "worker", "waiters", "jobs", "directory", "verifying",
    "snapshots", "source", "watchers", "deadlines", "live_records",
    # its steps, for tests that block or skip one of them
    "capture", "closed", "compact_by_itself", "is_called_for", "mark", "note_metadata", "opened", "release", "require",
    "sync_to", "await_applied", "wait_no_more", "waiting_for_entries", "write_captured", "write_state", "bytes",
    # the order of keys
    "ask_for_order", "keep_order", "keys_of_range", "looked_past", "order", "order_next",
    # MemoryStateMachine
    "entries", "metadata", "running", "state", "state_as_of",
    # Directory; the threads of coroutines
    "lock", "thread",
    # RaftLog
    "abandon", "is_closed", "is_poisoned",
    # Reader
    "await_news", "take_news", "taken_up_to",
    # the node of examples/raft_from_nothing
    "advance", "answer", "apply", "campaign", "follow", "lead", "on_vote", "spawn",
})  # fmt: skip


class Inside:
    """The private attributes of one object, read and written without their underscore."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        object.__setattr__(self, "of", of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, private(name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.of, private(name), value)


def private(name: str) -> str:
    """Return the name with its underscore; raise ``AttributeError`` if it is not listed above."""
    if name not in NAMES:
        raise AttributeError(f"{name} is not among the private names that tests look at: see {__name__}")
    return f"_{name}"


def inside(of: Any) -> Any:
    """Return access to the private attributes of a machine, of one of its parts, or of a class."""
    return Inside(of)
