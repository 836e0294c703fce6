"""A base and the log stacked on it: append, sync, recovery, verification, and the file CURRENT that names the pair.

It may import `lookup`, `disk`, `background`, `event_loops`, `named` and what they import.
"""
