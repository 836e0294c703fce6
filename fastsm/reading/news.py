"""When there is something to take, and from which file: the same for a reader's state and for its watches."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, NamedTuple

from fastsm.disk.files import storage_errors
from fastsm.errors import CorruptionError, ReentryError, StorageError
from fastsm.reading.frames import is_still_there
from fastsm.reading.opening import is_owned, open_directory, open_publication, open_state

if TYPE_CHECKING:
    import threading

    from fastsm.disk.files import Directory
    from fastsm.disk.published import Publication, Published
    from fastsm.generation.log import Log
    from fastsm.reading.frames import Lookout
    from fastsm.reading.opening import Opened, Recover
    from fastsm.types import LogId

RECOVERY_SECONDS = 10.0  # for this long, missing published frames may be due to an owner that is still recovering
LARGE = 256 << 10  # bytes of frames: more are not taken on an event loop


class Missing(NamedTuple):
    """Published frames that were missing: the publication, and when they were first missed."""

    incarnation: int
    number: int
    since: float


class Following:
    """What a reader and its tail have in common: both follow a publication.

    The compiled half of each takes the frames, and records how far it has taken them.
    """

    if not TYPE_CHECKING:
        __slots__ = ()  # those below are slots of the subclasses: only one base of a class may define some

    path: str
    _recover: Recover  # makes a state from a log that is opened
    _directory: Directory | None  # of that log
    _lock: threading.RLock  # only one thread follows at a time
    _following: bool  # a thread is following, so its signal handlers must not
    _close_late: bool
    _missing: Missing | None

    if TYPE_CHECKING:  # the compiled half
        _log: Log
        _lookout: Lookout
        _incarnation: int
        _broken: bool
        _position: LogId

        def _goes_on_in(self, incarnation: int) -> None: ...
        def _take_up_to(self, end: int, applied_index: int, applied_term: int, durable_index: int) -> None: ...
        def _taken_up_to(self) -> int: ...

    def _require_open(self) -> None:
        """Raises ``NotRunningError`` if the reader is closed."""
        raise NotImplementedError

    def _take_opened(self, opened: Opened, publication: Publication | None) -> None:
        """Shows an opened state, in one step at the end."""
        raise NotImplementedError

    def _release(self) -> None:
        """Releases everything that it holds."""
        raise NotImplementedError

    def _begin_following(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._following = self._close_late = False
        self._missing = None

    def _open_files(self) -> None:
        """Opens what exists now, and shows it."""
        directory = open_directory(self.path)
        log: Log | None = None
        try:
            publication = open_publication(directory)
            if publication is not None:
                publication.go_on_from(self._lookout.publication)
            opened = open_state(directory, publication, self._recover)
            log = opened.generation.log
            self._take_opened(opened, publication)
        except BaseException:
            if log is None or self._log is not log:
                if log is not None:
                    log.close()
                directory.close()
                raise
            self._hold(directory)  # a signal handler has raised this after the step
            raise
        self._hold(directory)

    def _hold(self, directory: Directory) -> None:
        """Keeps the directory of the current log open, and closes the previous one."""
        old, self._directory = self._directory, directory
        if old is not None:
            old.close()

    def _reopen(self) -> None:
        """Replaces what is shown by the state that exists now."""
        before = self._log
        try:
            self._open_files()
        finally:
            if self._log is not before:
                before.close()

    def _follow(self) -> LogId:
        """Takes what is new, if anything."""
        with self._lock:
            if self._following:
                raise ReentryError(f"{self.path}: this thread is already refreshing this reader; call again later")
            self._following = True
            try:
                self._require_open()
                try:
                    self._take_news()
                except BaseException:
                    publication = self._lookout.publication
                    if publication is not None:
                        publication.forget()  # so that it is looked at again
                    raise
            finally:
                self._following = False
                if self._close_late:
                    self._release()
            return self._position

    def _take_news(self) -> None:
        if self._is_elsewhere():
            self._reopen()
            return
        publication = self._lookout.publication
        if publication is None:
            return
        published = publication.read()
        if published is None or not publication.is_of_this_run(published):
            return  # a publication from before the machine's restart says nothing about what its disk has kept
        if not self._is_continued(published):
            self._reopen()
            return
        self._goes_on_in(published.incarnation)
        try:
            self._take_up_to(published.end, published.applied_index, published.applied_term, published.durable_index)
        except CorruptionError:
            # The owner has published frames, and the disk then lost them: the next owner will not have them either.
            if self._may_be_recovering(published):
                self._lookout.look_again()
            elif self._is_owned():
                raise
        else:
            self._missing = None

    def _is_owned(self) -> bool:
        directory = open_directory(self.path)
        try:
            return is_owned(directory)
        finally:
            directory.close()

    def _may_be_recovering(self, published: Published) -> bool:
        """Returns whether the directory's owner may be a new one, which will soon publish what is left.

        That is not so if more was published in the same opening: then that owner is alive, and its frames are damaged.
        """
        missing = self._missing
        if missing is None or missing.incarnation != published.incarnation:
            missing = self._missing = Missing(published.incarnation, published.number, time.monotonic())
        return missing.number == published.number and time.monotonic() - missing.since < RECOVERY_SECONDS

    def _is_elsewhere(self) -> bool:
        """Returns whether the file in which the owner publishes was replaced, or has appeared where there was none.

        Checks the name of an open file only when that is due; if none is open, looks for one at each call.
        """
        publication = self._lookout.publication
        if publication is not None:
            with storage_errors(publication.path, "comparing the file with the open one"):
                return self._lookout.is_due() and not publication.is_at(publication.path)
        self._lookout.look_again()
        try:
            directory = open_directory(self.path)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        try:
            return open_publication(directory) is not None
        finally:
            directory.close()

    def _is_continued(self, published: Published) -> bool:
        """Returns whether the published log is the one read here, and continues after the frames that were taken."""
        if self._broken or published.identity != self._log.head.identity:
            return False
        if published.incarnation == self._incarnation:
            return True
        return published.end >= self._taken_up_to() and is_still_there(self._log)

    def _has_much_to_take(self) -> bool:
        """Returns whether following may take long, so that an event loop should have it done on another thread."""
        publication = self._lookout.publication
        if publication is None or self._lookout.may_lead_elsewhere():
            return True
        if not publication.is_news():
            return False
        published = publication.peek()
        if published is None:
            return False
        same = (published.identity, published.incarnation) == (self._log.head.identity, self._incarnation)
        return not same or published.end > self._taken_up_to() + LARGE or self._broken
