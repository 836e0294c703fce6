"""From keys to places, from entries to terms, and which records are dead. It opens no file.

It may import `disk` and what it imports.
"""
