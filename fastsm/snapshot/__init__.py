"""A snapshot's file: captured, written, read, received in pieces, copied in.

It may import `generation`, `lookup`, `disk` and what they import.
"""
