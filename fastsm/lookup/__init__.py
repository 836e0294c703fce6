"""The indexes in memory: from keys to places, from entries to terms, which records are dead. Opens no files.

It may import `disk` and what it imports.
"""
