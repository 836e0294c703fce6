"""A Raft node (Ongaro, "Consensus: bridging theory and practice", 2014): election, replication, commitment.

Everything runs on one event loop, so between two awaits nothing else happens. During an await anything may change: a
coroutine checks afterwards whether the term is still the same.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path

from storage import Storage, config_of, members_of
from wire import LARGEST_COMMAND, Address, Link, Message, Unreachable, pack_entries, receive, send, unpack_entries

from fastsm import Answer, CommandError, Entry, LogId, SnapshotMetadata, noop, open_snapshot

HEARTBEAT = 0.05
ELECTION = (0.3, 0.6)  # seconds without a leader, drawn for each wait
REPLY = 1.0            # seconds that a reply may take
PIECE = 256 << 10      # bytes of commands, or of a snapshot, in one message

FOLLOWER, CANDIDATE, LEADER = "follower", "candidate", "leader"


class NotLeader(Exception):
    """This node is not the leader. Nothing was done."""


class Unknown(Exception):
    """Leadership was lost while the command was in flight: it may be applied later, or never."""


class Progress:
    """How far a peer's log agrees with the leader's, and when the request that it last answered was sent."""

    def __init__(self, next_index: int) -> None:
        self.next, self.match, self.answered = next_index, 0, 0.0


class Node:
    """One member, called ``name``. ``addresses`` holds the address of every node, including this one.

    ``members`` are those of a new cluster. A node that will be added to a cluster later starts with none.
    """

    def __init__(
        self, name: str, folder: Path, addresses: dict[str, Address], members: list[str], *,
        snapshot_every: int = 10_000,
    ) -> None:
        self.name, self.addresses, self.snapshot_every = name, addresses, snapshot_every
        self.storage = Storage(folder, members)
        self.log, self.machine = self.storage.log, self.storage.machine
        self.term, voted = self.log.hard_state()
        self.voted_for = voted.decode() if voted is not None else None
        self.role, self.leader, self.heard = FOLLOWER, "", 0.0
        self.commit = self.machine.last_applied().index
        self.peers: dict[str, Progress] = {}
        self.waiting: dict[int, tuple[int, asyncio.Future[object]]] = {}  # index: the term proposed in, its result
        self.news = self.committed = asyncio.Event()  # replaced by `start`, on the running loop
        self.tasks: set[asyncio.Task[None]] = set()

    # ---- life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and take part in the cluster from now on."""
        self.news, self.committed = asyncio.Event(), asyncio.Event()
        self.heard = self.now()
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.addresses[self.name][1])
        self._spawn(self._hold_elections())
        self._spawn(self._apply())

    async def stop(self) -> None:
        self._follow(self.term)  # a cancelled task may already have its reply and continue: it must not act as leader
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.storage.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:  # a failing disk or a bug: better no node
            asyncio.get_running_loop().call_exception_handler(  # than one that half works
                {"message": f"{self.name} cannot go on", "exception": task.exception(), "task": task})

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- terms and elections ---------------------------------------------------------------------------

    def _follow(self, term: int, leader: str = "") -> None:
        """Become a follower in a term that is at least ours."""
        if term > self.term:
            self.log.save_hard_state(term, None)  # durable before any reply; it blocks the loop, but is rare
            self.term, self.voted_for = term, None
        self.role, self.leader = FOLLOWER, leader
        self.news.set()
        for _, result in self.waiting.values():
            if not result.done():
                result.set_exception(Unknown("another node leads now"))
        self.waiting.clear()

    async def _hold_elections(self) -> None:
        while True:
            patience = random.uniform(*ELECTION)
            while self.role == LEADER or self.now() - self.heard < patience:
                await asyncio.sleep(HEARTBEAT / 2)
                if self.role == LEADER:
                    self._step_down_unless_heard()
            if self.name in self.storage.members:
                await self._campaign()
            self.heard = self.now()

    def _step_down_unless_heard(self) -> None:
        """Step down if no majority answers, so that clients try other nodes (thesis, 6.2)."""
        last = [self.peers[name].answered if name in self.peers else self.now() for name in self.storage.members]
        if sorted(last)[(len(last) - 1) // 2] < self.now() - ELECTION[1]:
            self._follow(self.term)

    async def _campaign(self) -> None:
        self.log.save_hard_state(self.term + 1, self.name.encode())
        self.term, self.voted_for = self.term + 1, self.name
        self.role, self.leader, term = CANDIDATE, "", self.term
        members = self.storage.members
        request = {"type": "vote", "term": term, "from": self.name, "last": [self.log.last_term, self.log.last_index]}
        votes, until = 1, self.now() + ELECTION[0]
        asking = {asyncio.ensure_future(self._ask(name, request)) for name in members if name != self.name}
        while asking and votes <= len(members) // 2 and self.now() < until and self.role == CANDIDATE:
            done, asking = await asyncio.wait(
                asking, timeout=until - self.now(), return_when=asyncio.FIRST_COMPLETED)
            votes += sum(task.result() for task in done)
        for task in asking:
            task.cancel()
        if votes > len(members) // 2 and self.term == term and self.role == CANDIDATE:
            self._lead()

    async def _ask(self, name: str, request: Message) -> bool:
        """Ask another node for its vote, on a new connection; return whether it was granted."""
        link = Link(self.addresses[name])
        try:
            reply, _ = await link.call(request, timeout=REPLY)
        except Unreachable:
            return False
        finally:
            link.close()
        if reply["term"] > self.term:
            self._follow(reply["term"])
        return bool(reply["granted"])

    async def _on_vote(self, request: Message) -> Message:
        heard_lately = self.leader and self.now() - self.heard < ELECTION[0]
        if heard_lately or self.role == LEADER:  # a removed or cut-off node does not disturb the cluster (4.2.3)
            return {"term": self.term, "granted": False}
        if request["term"] > self.term:
            self._follow(request["term"])
        complete = request["last"] >= [self.log.last_term, self.log.last_index]
        granted = request["term"] == self.term and self.voted_for in (None, request["from"]) and complete
        if granted:
            self.log.save_hard_state(self.term, request["from"].encode())
            self.voted_for, self.heard = request["from"], self.now()
        return {"term": self.term, "granted": granted}

    # ---- the leader ------------------------------------------------------------------------------------

    def _lead(self) -> None:
        self.role, self.leader, self.peers = LEADER, self.name, {}
        self._replicate_to_all()
        self._append(noop())  # commits earlier leaders' entries. Not in a task, which might start in a later term
        self._spawn(self._sync_and_advance())

    def _replicate_to_all(self) -> None:
        for name in self.storage.members:
            if name != self.name and name not in self.peers:
                self.peers[name] = Progress(self.log.last_index + 1)
                self.peers[name].answered = self.now()
                self._spawn(self._replicate(name, self.peers[name], self.term))

    def _append(self, command: bytes) -> Entry:
        entry = Entry(self.log.last_index + 1, self.term, command)
        self.storage.append([entry])
        self._replicate_to_all()
        self.news.set()
        return entry

    async def _sync_and_advance(self) -> None:
        await self.log.sync_async()  # one sync for all waiting proposals, while entries go to the followers
        self._advance()

    async def propose(self, command: bytes) -> bool | Answer | None:
        """Replicate a command; return its result once it is applied here. Raises ``NotLeader`` and ``Unknown``."""
        if self.role != LEADER:
            raise NotLeader(self.leader)
        self.machine.check(command)
        entry = self._append(command)
        result: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.waiting[entry.index] = self.term, result
        await self.log.sync_async()
        self._advance()
        return await result  # type: ignore[return-value]

    async def change_members(self, members: list[str]) -> None:
        """Add or remove one node; return when that is committed. A repeated request changes nothing."""
        while self.role == LEADER and self.storage.config_index > self.commit:
            await asyncio.sleep(HEARTBEAT)  # the previous change must be committed first
        if self.role != LEADER or self.log.term(self.commit) != self.term:
            raise NotLeader(self.leader)  # not allowed before the leader's first entry is committed (thesis, 4.1)
        changed = set(members) ^ set(self.storage.members)
        if len(changed) > 1:
            raise ValueError(f"one node at a time; this adds or removes {', '.join(sorted(changed))}")
        if changed:
            await self.propose(config_of(members))

    async def read_index(self) -> int:
        """Return an index that covers every command acknowledged so far: apply up to it, then read (thesis, 6.4)."""
        if self.role != LEADER or self.log.term(self.commit) != self.term:
            raise NotLeader(self.leader)
        index, term, asked = self.commit, self.term, self.now()
        while True:  # a node that answers a request sent after (not at) this moment had no newer leader then
            if self.role != LEADER or self.term != term:
                raise NotLeader(self.leader)
            members = self.storage.members
            since = sum(name == self.name or self.peers[name].answered > asked for name in members)
            if since > len(members) // 2:
                return index
            self.news.set()
            await asyncio.sleep(HEARTBEAT / 50)

    async def _replicate(self, name: str, peer: Progress, term: int) -> None:
        """Keep one follower's log equal to ours, for as long as we lead and it is a member."""
        link = Link(self.addresses[name])
        try:
            while self.role == LEADER and self.term == term and name in self.storage.members:
                try:
                    asked = self.now()
                    reply = await self._send_what_is_next(link, peer)
                except Unreachable:
                    await asyncio.sleep(HEARTBEAT)
                    continue
                if reply["term"] > self.term:
                    self._follow(reply["term"])
                elif self.role == LEADER and self.term == term:
                    peer.answered = asked
                    peer.next, peer.match = reply["match"] + 1, reply["match"] if reply["ok"] else peer.match
                    self._advance()
                    if reply["ok"] and peer.next > self.log.last_index:
                        await self._wait_for_news()
        finally:
            link.close()
            if self.peers.get(name) is peer:
                del self.peers[name]

    async def _wait_for_news(self) -> None:
        news = self.news
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(news.wait(), HEARTBEAT)
        if self.news is news:
            self.news = asyncio.Event()

    async def _send_what_is_next(self, link: Link, peer: Progress) -> Message:
        before = peer.next - 1
        if before < self.log.first_index - 1:
            return await self._send_snapshot(link)
        term = self.log.term(before) or 0
        entries = self.log.entries(peer.next, self.log.last_index, max_bytes=PIECE)
        heads, blob = pack_entries(entries)
        request = {"type": "append", "term": self.term, "from": self.name, "before": [before, term],
                   "entries": heads, "commit": self.commit}
        return (await link.call(request, blob, timeout=REPLY))[0]

    async def _send_snapshot(self, link: Link) -> Message:
        with open_snapshot(self.storage.snapshots) as snapshot:
            request = {"type": "snapshot", "term": self.term, "from": self.name,
                       "metadata": snapshot.metadata.to_bytes().hex()}
            reply, _ = await link.call(request, timeout=REPLY)
            while "offset" in reply:
                piece = snapshot.read_at(reply["offset"], PIECE)
                request = {"type": "piece", "term": self.term, "from": self.name, "offset": reply["offset"]}
                reply, _ = await link.call(request, piece, timeout=30 * REPLY)  # installing follows the last piece
            return reply

    def _advance(self) -> None:
        """Commit up to the last entry that a majority has durably, if it is of this term (thesis, 3.6.2)."""
        if self.role != LEADER:
            return
        have = sorted(self.log.durable_index if name == self.name else self.peers[name].match
                      for name in self.storage.members)
        index = have[(len(have) - 1) // 2]
        if index > self.commit and self.log.term(index) == self.term:
            self.commit = index
            self.committed.set()

    # ---- the follower ----------------------------------------------------------------------------------

    async def _on_append(self, request: Message, blob: bytes) -> Message:
        self._hear(request)
        before = LogId(*request["before"])
        if not self.storage.fits(before):
            return {"term": self.term, "ok": False, "match": min(before.index - 1, self.log.last_index)}
        entries = unpack_entries(request["entries"], blob)
        self.storage.take(entries)
        await self.log.sync_async()
        match = before.index + len(entries)
        if min(request["commit"], match) > self.commit and self.term == request["term"]:
            self.commit = min(request["commit"], match)
            self.committed.set()
        return {"term": self.term, "ok": True, "match": match}

    async def _on_snapshot(self, request: Message) -> Message:
        self._hear(request)
        metadata = SnapshotMetadata.from_bytes(bytes.fromhex(request["metadata"]))
        return await self._after_piece(self.storage.expect_snapshot(metadata))

    async def _on_piece(self, request: Message, blob: bytes) -> Message:
        self._hear(request)
        assert self.storage.receiver is not None
        return await self._after_piece(self.storage.receiver.write(request["offset"], blob))

    async def _after_piece(self, offset: int) -> Message:
        assert self.storage.receiver is not None
        if not self.storage.receiver.complete:
            return {"term": self.term, "offset": offset}
        included = await self.storage.install()
        self.commit, self.heard = max(self.commit, included.index), self.now()
        return {"term": self.term, "ok": True, "match": included.index}

    def _hear(self, request: Message) -> None:
        if request["term"] > self.term or self.role != FOLLOWER or self.leader != request["from"]:
            self._follow(request["term"], request["from"])
        self.heard = self.now()

    # ---- every role ------------------------------------------------------------------------------------

    async def _apply(self) -> None:
        """Apply committed entries in order, and answer the proposals that wait for them."""
        snapshot: asyncio.Task[None] | None = None
        while True:
            await self.committed.wait()
            self.committed.clear()
            while (last := self.machine.last_applied().index) < self.commit:
                entries = self.log.entries(last + 1, self.commit, max_bytes=PIECE)
                for entry, said in zip(entries, await self.machine.apply_chunk(entries), strict=True):
                    self._tell(entry, said)
            taken = self.machine.snapshot_metadata()
            since = self.machine.last_applied().index - (taken.last_included.index if taken else 0)
            if since >= self.snapshot_every and (snapshot is None or snapshot.done()):
                snapshot = self._spawn(self.storage.take_snapshot(self.snapshot_every // 10))

    def _tell(self, entry: Entry, said: object) -> None:
        term, result = self.waiting.pop(entry.index, (0, None))
        if result is not None and not result.done():
            if term == entry.term:
                result.set_result(said)
            else:
                result.set_exception(Unknown("another entry took its place"))
        if self.role == LEADER and entry.index == self.storage.config_index and self.name not in (
                members_of(entry.command) or [self.name]):
            self._follow(self.term)  # this node was removed, and the entry that removes it is committed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while True:
                request, blob = await receive(reader)
                await send(writer, *await self._answer(request, blob))
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # the client disconnected, or this node is stopping
        finally:
            self.tasks.discard(task)
            writer.close()

    async def _answer(self, request: Message, blob: bytes) -> tuple[Message, bytes]:
        kind = request["type"]
        if kind in ("append", "snapshot", "piece") and request["term"] < self.term:
            return {"term": self.term, "ok": False, "match": 0}, b""
        if kind == "vote":
            return await self._on_vote(request), b""
        if kind == "append":
            return await self._on_append(request, blob), b""
        if kind == "snapshot":
            return await self._on_snapshot(request), b""
        if kind == "piece":
            return await self._on_piece(request, blob), b""
        return await self._answer_client(request, blob)

    async def _answer_client(self, request: Message, blob: bytes) -> tuple[Message, bytes]:
        try:
            if request["type"] == "members":
                await self.change_members(request["members"])
                return {"done": True}, b""
            if request["type"] == "get":
                await self.machine.wait_applied_async(await self.read_index())
                value = self.machine.get(blob)
                return {"done": True, "found": value is not None}, value or b""
            if len(blob) > LARGEST_COMMAND:
                raise CommandError(f"a command of {len(blob)} bytes; at most {LARGEST_COMMAND} are taken")
            if members_of(blob) is not None:
                raise CommandError("the members are changed by a request of their own")
            said = await self.propose(blob)
        except NotLeader:
            return {"leader": self.leader}, b""
        except Unknown as error:
            return {"unknown": str(error)}, b""
        except (CommandError, ValueError) as error:
            return {"refused": str(error)}, b""
        value = said.value if isinstance(said, Answer) else None
        plain = value if isinstance(value, (bool, int, type(None))) else repr(value)
        return {"done": True, "ok": bool(said), "value": plain}, b""
