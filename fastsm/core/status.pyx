"""The status of a machine: whether a call may go on, and whether the state is still the one that a job began with."""

import copy

from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uint64_t

from fastsm.core.awaited cimport ENDED, Awaited
from fastsm.core.watchers cimport Watchers

from fastsm.errors import NotRunningError, ProcedureError, SnapshotError

REASONS = {
    STOPPED: "this state machine is stopped: call start() first",
    CLOSED: "this state machine is closed: open the directory again",
    FORKED: "this is a forked child's copy of its parent's state machine: open a directory of your own",
}


cdef class Status:
    """Whether the machine runs, and which state it has; waiting callers are told when either ends.

    Thread safety: every method, from any thread.
    """

    def __cinit__(self, *args, **options):
        self.status = self.gate = CLOSED
        self.awaited = Awaited()
        self._watchers = Watchers()

    def _set_status(self, str status):
        new_status = {"running": RUNNING, "stopped": STOPPED, "closed": CLOSED, "forked": FORKED}[status]
        if self.status != CORRUPT or new_status > STOPPED:
            self.status = new_status
            self.set_gate()
        if new_status == STOPPED or new_status == CLOSED:
            self.awaited.end_all(ENDED)
            self._watchers.wake_all()

    def _run_again(self):
        """Runs again after a stop. Atomic, so that it never undoes a close that another thread completes meanwhile."""
        if self.gate > STOPPED:
            self.refuse()
        self.status = RUNNING
        self.set_gate()

    def _closed(self):
        return self.status == CLOSED

    def _forked(self):
        return self.status == FORKED

    def is_running(self):
        """Returns True from construction, or `start`, until `stop` or `close`; False in a forked child."""
        return self.status == RUNNING or (self.status == CORRUPT and self.ran)

    cdef void set_gate(self) noexcept:
        """Recomputes `gate`; to be called whenever `status` or `calling` has changed."""
        self.gate = self.status if self.status or not self.calling else CALLING

    cdef int refuse(self) except -1:
        """Raises the reason why the caller may not go on; returns if only the thread of a procedure may not."""
        if self.calling and self.calling == PyThread_get_thread_ident():
            raise ProcedureError(
                "a procedure called the state machine that runs it: it may read and write only through its tx")
        if self.status == CORRUPT:
            raise copy.copy(self.corruption)
        if self.status:
            raise NotRunningError(REASONS[self.status])
        return 0

    def _refuse_procedure(self):
        """Raises `ProcedureError` on the thread of a procedure that this machine is running."""
        if self.calling and self.calling == PyThread_get_thread_ident():
            self.refuse()

    def _set_corrupt(self, error):
        """Makes every later call except `close` and `is_running` raise this error."""
        self.corruption = error
        if self.status <= STOPPED:
            self.ran = self.status == RUNNING
            self.status = CORRUPT
            self.set_gate()
            self.awaited.end_all(ENDED)
            self._watchers.wake_all()

    def _set_verified(self, bint verified):
        self._verified = verified

    def _settle_verification(self, uint64_t epoch, error=None):
        """Takes the result of verifying the files of `epoch`, unless the state has other files by now.

        Returns whether it did. Runs no Python code.
        """
        if self._epoch != epoch:
            return False
        if error is None:
            self._verified = True
        else:
            self._set_corrupt(error)
        return True

    def _corrupt(self):
        return self.status == CORRUPT

    def _require(self, bint stopped_is_fine=False):
        if self.gate and not (stopped_is_fine and self.gate == STOPPED):
            self.refuse()

    # ---- epoch -----------------------------------------------------------------------------------------

    def _is_same_state(self, uint64_t epoch):
        """Returns whether there was no reset and no install since `epoch`; compactions do not count."""
        return self._epoch >> 32 == epoch >> 32

    def _refuse_replaced(self, uint64_t epoch, str what):
        """Raises `SnapshotError` if there was a reset or an install since `epoch`."""
        if self._epoch >> 32 != epoch >> 32:
            raise SnapshotError(
                f"the {what} was ended by a reset or an install, which replaced the state, and has left no files: call "
                "it again for the new state")

    def _refuse_moved(self, uint64_t epoch, str what):
        """Raises `SnapshotError` if there was a reset, an install or a compaction since `epoch`."""
        self._refuse_replaced(epoch, what)
        if self._epoch != epoch:
            raise SnapshotError(f"the {what} was overtaken by a compaction, and has left no files: call it again")
