"""The state and what changes it: apply, writers' turns, group commit, coroutines, snapshots, compaction, installs.

It may import `snapshot`, `generation`, `lookup`, `disk` and what they import.
"""
