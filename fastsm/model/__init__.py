"""The model: the same state machine on a dict, for tests and as a specification. It opens no files but snapshots.

It may import `snapshot`, `disk`, `command` and what they import.
"""
