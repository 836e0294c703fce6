"""The standard streams of a command: closed ones, and outputs that take nothing."""

from __future__ import annotations

import os
import sys


def replace_closed_streams() -> None:
    """Puts descriptors that can neither be read nor written in place of standard ones that are closed.

    Otherwise the next file that is opened, maybe a state's, would be the standard output. What is printed fails with
    EBADF, as it would in C.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the system gives the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def give_up_output() -> None:
    """Lets what is still to be written to the standard output go nowhere: the interpreter must not fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
