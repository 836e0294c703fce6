"""The standard streams of a command: streams that are closed, and outputs that accept nothing more."""

from __future__ import annotations

import os
import sys


def replace_closed_streams() -> None:
    """Replaces closed standard streams: the input by one that cannot be read, outputs by ones that cannot be written.

    Otherwise the next file that is opened, such as a state's, would become the standard output. Printing to the
    standard output then fails with EBADF, as it would in C; messages to the standard error are dropped.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the system returns the lowest free number
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def give_up_output() -> None:
    """Discards what is still buffered for the standard output, so that the interpreter does not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
