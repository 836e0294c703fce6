"""The command ``fastsm``, also as ``python -m fastsm``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def fill_closed_streams() -> None:
    """Puts something in the place of standard streams that are closed, so that no file that is opened takes it.

    Input is then empty, and output is refused by the system, as it is for other commands.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)  # the lowest number that is free
            if number == 1:
                sys.stdout = os.fdopen(1, "w", closefd=False)  # a write is EBADF, since it is open for reading
            elif number == 2:
                sys.stderr = os.fdopen(2, "w", closefd=False)


def run(app: Callable[[], object]) -> None:
    """Runs the command line; an error of the system outside of any command is one line, too."""
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        if sys.stdout.fileno() == 1:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes at its end what could not be written
        name = os.fsdecode(error.filename) if error.filename else "standard output"
        sys.exit(f"fastsm: {name}: {error.strerror}")


def main() -> None:
    """Imports the command line, whose libraries for drawing are an extra and may be missing, and runs it."""
    fill_closed_streams()
    try:
        from fastsm.cli import app  # noqa: PLC0415 (only here is it known what its absence means)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastsm":
            raise
        sys.exit(f'fastsm: the command line needs the module {error.name}: pip install "fastsm[cli]"')
    except KeyboardInterrupt:
        sys.exit(130)
    run(app)


if __name__ == "__main__":
    main()
