"""``FastJournal``: PySyncObj's journal interface, on top of fastsm's journal."""

from __future__ import annotations

import pysyncobj.journal

from fastsm.integrations.pysyncobj.positions import Positions


class FastJournal(Positions, pysyncobj.journal.Journal):  # type: ignore[misc]  # PySyncObj has no types
    """A ``pysyncobj.journal.Journal`` in a directory: a Raft log like that of :class:`fastsm.RaftLog`.

    Unlike PySyncObj's own journal it is crash-safe at both ends, keeps no copy of the entries in memory, and has no
    limit of 4 GiB. It includes term and vote. Positions count from the first kept entry, as in a list.
    """

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Removes the entries from a position on, in one step."""
        if entryFrom < len(self):
            self.cut(self.first_index + entryFrom)

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Removes the entries before a position, in one step."""
        if entryTo >= len(self):
            self.clear()
        else:
            self.truncate_before(self.first_index + entryTo)
        self.remove_retired()

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Sets the commit index in memory; :meth:`onOneSecondTimer` writes it to disk."""
        self.set_commit_index(raftCommitIndex)

    def getRaftCommitIndex(self) -> int:
        return max(1, self.commit_index)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        self.set_vote(term, votedForNodeId)

    def getCurrentTerm(self) -> int:
        return self.term

    def getVotedForNodeId(self) -> str | None:
        return self.vote

    def onOneSecondTimer(self) -> None:
        self.write_commit_index()

    def _destroy(self) -> None:
        self.close()
