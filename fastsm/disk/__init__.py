"""Byte layouts, checksums, and the calls to the system by which the files of a state are handled.

Only this folder opens, syncs and renames those files, and defines the layouts of most of them (those of a Raft log's
entries are in `journal`). It may import `errors`, `types` and `units`.
"""
