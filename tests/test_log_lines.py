"""Lines of the log: every handler can write them, whatever bytes are in a path."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest

import fastsm
from fastsm.log_lines import EncodableLines


@pytest.fixture
def written() -> io.BytesIO:
    return io.BytesIO()


@pytest.fixture
def handler(written: io.BytesIO) -> logging.Handler:
    handler = logging.StreamHandler(io.TextIOWrapper(written, encoding="utf-8", write_through=True))
    handler.handleError = pytest.fail  # type: ignore[assignment,method-assign]
    return handler


def test_a_path_that_is_not_utf_8_loses_no_line(tmp_path: Path, written: io.BytesIO, handler: logging.Handler) -> None:
    """Log lines of an opening, a snapshot and a torn tail are written, with the path's invalid byte escaped."""
    logger = logging.getLogger("fastsm")
    path = os.fsencode(tmp_path) + b"/stat\xe9"
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with fastsm.FastStateMachine(os.fsdecode(path)) as machine:
            machine.apply([(1, 1, fastsm.put(b"a", b"1"))])
            machine.write_snapshot(os.fsdecode(path + b"-snapshots"))
            with pytest.raises(fastsm.SnapshotRangeError):
                machine.write_snapshot(tmp_path, (5, 5))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = written.getvalue().decode("utf-8")
    assert "/stat\\udce9: open at" in lines
    assert "/stat\\udce9-snapshots/snapshot.fsm as of" in lines


def test_arguments_errors_and_tracebacks_are_escaped(written: io.BytesIO, handler: logging.Handler) -> None:
    """An invalid byte in an argument, an error's message or a traceback is escaped; other text is unchanged."""
    logger = logging.Logger("test")
    logger.addFilter(EncodableLines())
    logger.addHandler(handler)
    try:
        raise OSError("\udcff: broken")
    except OSError as error:
        logger.error("%s: %s", "\udcfe", error, exc_info=True)
    logger.warning("%s, %d", "grün", 5)
    lines = written.getvalue().decode("utf-8")
    assert "\\udcfe: \\udcff: broken\nTraceback" in lines
    assert "OSError: \\udcff: broken\n" in lines
    assert "grün, 5\n" in lines
