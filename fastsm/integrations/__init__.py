"""Raft libraries that run on fastsm. Nothing here is imported unless it is used."""
