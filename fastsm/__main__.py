"""The command ``fastsm``, also as ``python -m fastsm``."""

from __future__ import annotations

import sys

from fastsm.streams import give_up_output, replace_closed_streams


def main() -> None:
    """Runs the command line; its drawing library is an extra, so it may be missing."""
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
    except OSError as error:  # errors of files were reported by the commands themselves
        give_up_output()
        sys.exit(f"fastsm: standard output: {error.strerror}")


if __name__ == "__main__":
    main()
