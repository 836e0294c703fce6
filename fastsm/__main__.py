"""The command ``fastsm``, also as ``python -m fastsm``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; what it draws with is an extra, so it may be missing."""
    try:
        from fastsm.cli import app  # noqa: PLC0415 (only here is it known what its absence means)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "fastsm":
            raise
        sys.exit(f'fastsm: the command line needs the module {error.name}: pip install "fastsm[cli]"')
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
