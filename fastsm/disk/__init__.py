"""Byte layouts, checksums, and every call to the system that touches a file.

Only this folder knows an offset, opens, maps, syncs or renames. It may import `errors`, `types` and `units`.
"""
