"""The state as another process sees it: opened from outside, and followed while its owner goes on.

It may import `core`, `snapshot`, `generation`, `lookup`, `disk` and what they import.
"""
