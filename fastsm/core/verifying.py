"""Verification of a machine's files: on demand, in the background, and before a snapshot is made from them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from fastsm.core.engine import Engine
from fastsm.core.jobs import Job
from fastsm.disk.files import Directory, storage_errors
from fastsm.errors import CorruptionError
from fastsm.generation import current
from fastsm.generation.names import CURRENT
from fastsm.generation.verification import BackgroundVerification, Verification


class Verifying:
    """Verifies the files of one machine, whose engine is passed to each call; a result is dropped if they have changed.

    Thread safe.
    """

    __slots__ = ("_directory", "background")

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.background: BackgroundVerification | None = None

    def start(self, engine: Engine) -> None:
        """Starts checking all bytes in the background; a call after damage is found raises the error."""
        epoch, log, _, _ = engine._standing()
        machine = weakref.ref(engine)

        def report(error: Exception | None) -> None:
            found = machine()
            if found is not None and found._settle_verification(epoch, error) and error is not None:
                log.poison(error)

        self.background = BackgroundVerification(Verification(log), report)

    def stop(self) -> None:
        """Stops a background verification early."""
        if self.background is not None:
            self.background.stop()

    def ensure(self, engine: Engine, job: Job) -> None:
        """Returns once every byte was checked: a snapshot of unverified bytes would give damage a valid checksum."""
        if engine._verified:
            return
        if self.background is not None:
            self.background.wait(job.tick)
            engine._require()
        if not engine._verified:
            with engine._turns:  # no step to another generation may close the files meanwhile
                engine._require(True)
                epoch, log, _, _ = engine._standing()
                verification = Verification(log)
            verification.run(lambda done, total: job.tick())
            engine._settle_verification(epoch)

    def run(self, engine: Engine, progress: Callable[[int, int], None] | None) -> None:
        """Checks every byte now, and that CURRENT exists."""
        with engine._turns:
            engine._require()
            if current.read_current(self._directory) is None:
                raise CorruptionError(self._directory.path_of(CURRENT), None, "the name of the log in use", "no file")
            epoch, log, _, _ = engine._standing()
            with storage_errors(log.path, "reading the log"):
                verification = Verification(log)
        verification.run(progress)
        engine._settle_verification(epoch)
