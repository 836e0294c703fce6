"""Runs PySyncObj's own test suite on fastsm.

    git clone --depth 1 https://github.com/bakwc/PySyncObj
    python -m tests.pysyncobj_suite PySyncObj/test_syncobj.py [arguments of pytest]

`SyncObj` is `FastSyncObj` there, and `createJournal` makes a `FastJournal`. Needs `pip install cryptography`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import pysyncobj
import pytest

from fastsm.integrations.pysyncobj import FastJournal, FastSyncObj

DOES_NOT_APPLY = {
    "test_logCompactionRegressionTest1":
        "it has a private method of PySyncObj's read PySyncObj's own dump, of which there is none",
    "test_largeCommands":
        "it sends commands of 20 MB; more than 8 MiB are refused here, since they depose the leader at usual timeouts",
}  # fmt: skip


def create_journal(path: str | None = None) -> Any:
    """Make a `FastJournal`, in place of PySyncObj's function."""
    return pysyncobj.journal.MemoryJournal() if path is None else FastJournal(f"{path}.fastsm")


class OnFastsm:
    """A pytest plugin that puts fastsm in PySyncObj's place, and skips tests that do not apply."""

    missing: set[str]

    def pytest_configure(self) -> None:
        pysyncobj.SyncObj, pysyncobj.createJournal = FastSyncObj, create_journal

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.missing = DOES_NOT_APPLY.keys() - {item.name for item in items}
        for item in items:
            if item.name in DOES_NOT_APPLY:
                item.add_marker(pytest.mark.skip(reason=DOES_NOT_APPLY[item.name]))


def main(arguments: list[str]) -> int:
    plugin = OnFastsm()
    path, *rest = arguments
    usual = [os.path.abspath(path), "-q", "-rs", "-p", "no:cacheprovider", "--log-level=CRITICAL", "--show-capture=no"]
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)  # the tests leave files in the current folder, which later tests would find
        code = int(pytest.main([*usual, *rest], plugins=[plugin]))
        os.chdir("/")
    if plugin.missing and not rest:
        print(f"does not apply, but is not there either: {', '.join(sorted(plugin.missing))}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
