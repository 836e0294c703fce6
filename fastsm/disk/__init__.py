"""Byte layouts, checksums, and every call to the system that touches a file.

Only this folder contains offsets in files, and code that opens, maps, syncs or renames them. It may import `errors`,
`types` and `units`.
"""
