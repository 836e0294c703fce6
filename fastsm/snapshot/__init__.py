"""Snapshot files: captured, written, read, received in pieces, copied in.

It may import `generation`, `lookup`, `disk`, `background` and what they import.
"""
