"""A Raft library's own log: entries, term and vote, in files that are cut at both ends.

It may import `core`, `generation`, `disk` and what they import.
"""
