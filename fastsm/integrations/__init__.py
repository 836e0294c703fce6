"""Raft libraries that run on fastsm. Each is imported only when used."""
