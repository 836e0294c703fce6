"""The node's shorthands: a method for each command, and for each read of its state machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict

from fastsm import answering, command
from fastsm.integrations.pysyncobj.applying import Applying
from fastsm.integrations.pysyncobj.places import MARK
from fastsm.integrations.pysyncobj.waiting import Callback
from fastsm.types import LogId, Result, ScanResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer, Unpack


class Options(TypedDict, total=False):
    """How a caller gets the result of its command; see :meth:`ReplicatedStateMachine.submit`."""

    sync: bool
    callback: Callback | None
    timeout: float | None


class Shorthands(Applying):
    """Commands that are made and submitted in one call, and reads of what this node has applied.

    No method here calls another one, so a subclass may use any of these names for something else.
    """

    def _fastsm_do(self, made: bytes, options: Options, *, calls: bool = False) -> Result:
        """Submits a command made by this class; with ``calls`` it is checked first, since it may call procedures."""
        if calls:
            self._fastsm_require_running()
            self._fastsm_machine.check(made)
        result: Result = self._fastsm_submit(made, MARK, **options)
        return result

    def _fastsm_say(self, made: bytes, options: Options) -> bool | None:
        """Submits a command made by this class that has no ``Answer``."""
        result: bool | None = self._fastsm_submit(made, MARK, **options)
        return result

    # ---- commands --------------------------------------------------------------------------------------

    def put(
        self, key: Buffer, value: Buffer, *, expires: int | None = None, **options: Unpack[Options]
    ) -> bool | None:
        """Submits ``fastsm.put``; the other keywords are those of :meth:`submit`."""
        return self._fastsm_say(command.put(key, value, expires=expires), options)

    def delete(self, key: Buffer, **options: Unpack[Options]) -> bool | None:
        """Submits ``fastsm.delete``."""
        return self._fastsm_say(command.delete(key), options)

    def compare_and_swap(
        self, key: Buffer, expected: Buffer | None, value: Buffer | None, *, expires: int | None = None,
        **options: Unpack[Options],
    ) -> bool | None:
        """Submits ``fastsm.compare_and_swap``."""
        return self._fastsm_say(command.compare_and_swap(key, expected, value, expires=expires), options)

    def touch(self, key: Buffer, expires: int | None, **options: Unpack[Options]) -> bool | None:
        """Submits ``fastsm.touch``: sets or removes the deadline of a key."""
        return self._fastsm_say(answering.touch(key, expires), options)

    def tick(self, now: int, *, limit: int | None = None, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.tick``. The leader does so by itself, unless it was made with ``clock=None``."""
        return self._fastsm_do(answering.tick(now, limit=limit), options)

    def batch(self, members: Iterable[bytes], **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.batch``: all of the commands or none, in one entry."""
        return self._fastsm_do(command.batch(members), options)

    def add(self, key: Buffer, delta: int, *, initial: int = 0, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.add``; the answer's value is the new number."""
        return self._fastsm_do(answering.add(key, delta, initial=initial), options)

    def transaction(
        self, conditions: Iterable[Any], then: Iterable[bytes], otherwise: Iterable[bytes] = (),
        **options: Unpack[Options],
    ) -> Result:
        """Submits ``fastsm.transaction``; the answer's value is a list with one value for each command done."""
        return self._fastsm_do(answering.transaction(conditions, then, otherwise), options)

    def call(self, name: str, payload: Buffer = b"", *, version: int = 1, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.call``: runs one of the node's ``procedures`` on every node.

        Raises ``UnknownCommandError`` for a procedure that this node was not given.
        """
        return self._fastsm_do(answering.call(name, payload, version=version), options, calls=True)

    def delete_range(self, start: Buffer | None, end: Buffer | None, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.delete_range``; the answer's value is the number of keys removed."""
        return self._fastsm_do(answering.delete_range(start, end), options)

    def delete_prefix(self, prefix: Buffer, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.delete_prefix``; the answer's value is the number of keys removed."""
        return self._fastsm_do(answering.delete_prefix(prefix), options)

    def read(self, key: Buffer, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.read``: the answer's value is the key's value at that place in the log, or None."""
        return self._fastsm_do(answering.read(key), options)

    def open_session(self, *, expires: int | None = None, **options: Unpack[Options]) -> Result:
        """Submits ``fastsm.open_session``; the answer's value is the session's id, for :meth:`once`."""
        return self._fastsm_do(answering.open_session(expires=expires), options)

    def once(
        self, session: int, sequence: int, command: bytes, *, expires: int | None = None, **options: Unpack[Options]
    ) -> Result:
        """Submits ``fastsm.once``: a command that is applied once, however often it is submitted, on whatever node.

        So a caller that does not know the outcome (after a timeout, ``UNKNOWN_OUTCOME``, or if a node died) submits it
        again, with the same session and sequence, until it has the answer that the command gave when it took effect.
        """
        return self._fastsm_do(answering.once(session, sequence, command, expires=expires), options, calls=True)

    def forget(self, session: int, **options: Unpack[Options]) -> bool | None:
        """Submits ``fastsm.forget``."""
        return self._fastsm_say(answering.forget(session), options)

    # ---- reads -----------------------------------------------------------------------------------------

    def get(self, key: Buffer) -> bytes | None:
        """Returns the value of a key as this node has it, or None: this node may lag behind the leader. O(1)."""
        return self._fastsm_machine.get(key)

    def modified(self, key: Buffer) -> LogId | None:
        """Returns the entry that last wrote a key, as this node has it. O(1)."""
        return self._fastsm_machine.modified(key)

    def get_modified(self, key: Buffer) -> tuple[bytes, LogId] | None:
        """Returns the value of a key and the entry that wrote it, both of one applied state; None if it is absent."""
        machine = self._fastsm_machine
        while True:
            modified = machine.modified(key)
            value = machine.get(key)
            if machine.modified(key) == modified:  # no entry that wrote the key intervened
                return None if value is None or modified is None else (value, modified)

    def get_many(self, keys: Iterable[Buffer]) -> list[bytes | None]:
        """Returns the values of keys as this node has them, all from one applied state."""
        return self._fastsm_machine.get_many(keys)

    def get_view(self, key: Buffer) -> memoryview | None:
        """Returns the value of a key as this node has it, without a copy."""
        return self._fastsm_machine.get_view(key)

    def scan(
        self, start: Buffer | None = None, end: Buffer | None = None, *, prefix: Buffer | None = None,
        limit: int | None = None, reverse: bool = False,
    ) -> ScanResult:
        """Returns the pairs of a range in the order of their keys, as this node has them. O(log n + pairs)."""
        return self._fastsm_machine.scan(start, end, prefix=prefix, limit=limit, reverse=reverse)

    def scan_prefix(self, prefix: Buffer, *, limit: int | None = None, start_after: Buffer | None = None) -> ScanResult:
        """Returns the pairs with a prefix in the order of their keys, as this node has them."""
        return self._fastsm_machine.scan_prefix(prefix, limit=limit, start_after=start_after)

    def count(
        self, start: Buffer | None = None, end: Buffer | None = None, *, prefix: Buffer | None = None
    ) -> int:
        """Returns how many keys of a range this node has."""
        return self._fastsm_machine.count(start, end, prefix=prefix)

    def ordered(
        self, start: Buffer | None = None, end: Buffer | None = None, *, prefix: Buffer | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Returns an iterator over the pairs of a range as of the call, however much is applied meanwhile."""
        return self._fastsm_machine.ordered(start, end, prefix=prefix, reverse=reverse)

    def deadline(self, key: Buffer) -> int | None:
        """Returns the deadline of a key as this node has it, or None."""
        return self._fastsm_machine.deadline(key)

    def next_deadline(self) -> int | None:
        """Returns the earliest deadline of keys and sessions as this node has them, or None."""
        return self._fastsm_machine.next_deadline()

    def clock(self) -> int:
        """Returns the clock of this node's state machine, which ticks move forward; 0 before the first tick."""
        return self._fastsm_machine.clock()

    def sync_read(self, key: Buffer, *, timeout: float | None = None) -> bytes | None:
        """Returns the value of a key after a round through the log: includes everything acknowledged before the call.

        Raises :class:`SubmitError`.
        """
        self._fastsm_do(command.noop(), {"sync": True, "timeout": timeout})
        return self._fastsm_machine.get(key)
