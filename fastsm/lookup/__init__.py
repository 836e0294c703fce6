"""The indexes in memory: from keys to places, from entries to terms, which records are dead. Opens no files.

It may import `disk`, `long_work`, `libraries` and what they import.
"""
