"""The command ``fastsm``, also as ``python -m fastsm``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line; what it draws with is an extra, so it may be missing."""
    replace_closed_streams()
    try:
        from fastsm.cli import app  # noqa: PLC0415 (only here is it known what its absence means)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastsm":
            raise
        sys.exit(f'fastsm: the command line needs the module {error.name}: pip install "fastsm[cli]"')
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:  # those of files were told by the commands themselves
        give_up_output()
        sys.exit(f"fastsm: standard output: {error.strerror}")


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


if __name__ == "__main__":
    main()
