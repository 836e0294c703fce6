"""Group commit: overlapping flushes share one sync."""

from __future__ import annotations

import threading

from fastsm.log import Log


class GroupCommit:
    """Makes a log durable up to an offset, with as few syncs as overlapping callers allow.

    The first caller syncs, outside the GIL. Whoever comes meanwhile waits, and syncs only if that sync began
    too early for it. (The idea is as old as DeWitt et al., "Implementation Techniques for Main Memory Database
    Systems", SIGMOD 1984.) Thread safe.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._changed = threading.Condition()
        self._syncing = False
        self._closed = False

    def sync_up_to(self, offset: int) -> None:
        """Returns once the log is durable up to ``offset``; raises ``StorageError`` when that failed."""
        leading = False
        try:
            with self._changed:
                while self._syncing and not self._closed:
                    self._changed.wait()
                    if self.log.durable >= offset:
                        return
                if self._closed:
                    return  # whoever closes has synced everything, or raises the error itself
                leading = True
                self._syncing = True
            self.log.sync()
        finally:
            if leading:
                with self._changed:
                    self._syncing = False
                    self._changed.notify_all()

    def close(self) -> None:
        """Waits for a sync under way; afterwards there are none."""
        with self._changed:
            self._closed = True
            while self._syncing:
                self._changed.wait()
            self._changed.notify_all()
