"""The log of a Raft library itself: entries, term and vote, in files that are cut at both ends.

It may import `generation`, `disk` and what they import, but not `core`.
"""
