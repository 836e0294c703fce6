"""Forked children: what is open belongs to the parent, and is left to it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TypeVar

Open = TypeVar("Open")


def left_by_children(leave: Callable[[Open], object], *, go_on: bool = False) -> weakref.WeakSet[Open]:
    """Returns a set for open objects. In a forked child, ``leave`` is called on each, since they are the parent's.

    ``go_on``: the objects keep working in the child, so ``leave`` is called again in the child's own children.
    """
    opened: weakref.WeakSet[Open] = weakref.WeakSet()

    def leave_all() -> None:
        errors = []
        for one in list(opened):
            try:
                leave(one)
            except Exception as error:  # the others must be left too
                errors.append(error)
        if not go_on:
            opened.clear()
        if errors:
            raise errors[0]

    os.register_at_fork(after_in_child=leave_all)
    return opened
