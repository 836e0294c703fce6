"""The state as another process sees it: opened from outside, and followed while its owner keeps writing.

It may import `core`, `snapshot`, `generation`, `lookup`, `disk` and what they import.
"""
