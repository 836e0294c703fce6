"""Patroni's own Raft store on fastsm's base class, compared with PySyncObj's. Needs `pip install patroni`."""

from __future__ import annotations

import importlib.util
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("pysyncobj")
pytest.importorskip("patroni.dcs.raft", reason="Patroni, or its driver for PostgreSQL, is not installed")

import patroni.dcs.raft as on_stock
import pysyncobj
from patroni.postgresql.mpp import get_mpp

from fastsm.integrations.pysyncobj import FastSyncObj
from support.cluster import free_ports

# PySyncObj's own journal leaves closing a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def on_fastsm() -> ModuleType:
    """Import a second copy of Patroni's module, with fastsm's class as `pysyncobj.SyncObj`."""
    found = importlib.util.find_spec("patroni.dcs.raft")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pysyncobj, "SyncObj", FastSyncObj)
        found.loader.exec_module(module)
    return module


class Stores:
    """Patroni's stores of one cluster, each with its own tick thread, as Patroni runs them."""

    def __init__(self, module: ModuleType, root: Path) -> None:
        self.module, self.root = module, root
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(4)]
        self.running: dict[int, Any] = {}
        self.deleted: dict[int, list[str]] = {}

    def start(self, *numbers: int, members: int = 3) -> None:
        for number in numbers:
            deleted = self.deleted[number] = []
            self.running[number] = self.module.KVStoreTTL(
                None, None, deleted.append, commandsWaitLeader=False, self_addr=self.addresses[number],
                partner_addrs=self.addresses[:members], data_dir=str(self.root / str(number)), retry_timeout=10)
            self.running[number].conf.connectionRetryTime = 0.2
            self.running[number].startAutoTick()
        self.until(lambda: all(store.isReady() for store in self.running.values()))

    def stop(self, *numbers: int) -> None:
        for number in numbers:
            self.running.pop(number).destroy()

    def until(self, condition: Callable[[], object]) -> None:
        stop = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < stop, [
                (store.getStatus(), getattr(store, "failure", None), store.get("", recursive=True))
                for store in self.running.values()]
            time.sleep(0.02)

    def leader(self) -> int:
        """Return the number of the store that all running ones follow."""

        def found() -> list[int]:
            leads = [number for number, store in self.running.items() if store._isLeader()]
            followed = {store._getLeader() for store in self.running.values()}
            return leads if len(leads) == 1 and followed == {self.running[leads[0]].selfNode} else []

        self.until(found)
        return found()[0]

    def same(self) -> dict[str, Any]:
        """Wait until all stores have equal content; return it."""
        def contents() -> list[Any]:
            return [store.get("", recursive=True) for store in list(self.running.values())]

        self.until(lambda: all(each == contents()[0] for each in contents()))
        return dict(contents()[0])


@pytest.fixture(params=["stock", "fastsm"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    made = Stores(on_stock if request.param == "stock" else on_fastsm(), tmp_path)
    yield made
    made.stop(*made.running)


def test_keys_are_compared_by_value_index_and_existence(stores: Stores) -> None:
    """prevExist, prevValue, prevIndex and recursive deletion work from every node; indexes are equal on all nodes."""
    stores.start(0, 1, 2)
    first = stores.running[0].set("/a", "1", prevExist=False)
    assert first["value"] == "1"
    for number in (1, 2):
        stores.until(lambda number=number, first=first: stores.running[number].get("/a") == first)
        store = stores.running[number]
        assert store.set("/a", "2", prevExist=False) is False
        assert store.set("/a", "2", prevValue="other") is False
        assert store.set("/a", "2", prevIndex=first["index"] + 1) is False
        assert store.set("/b", "2", prevExist=True) is False
        second = store.set("/a", "2", prevIndex=first["index"])
        assert second["index"] > first["index"]
        assert second["created"] == first["created"]
        first = store.set("/a", "1", prevValue="2")
    for number, key in enumerate(("/dir/x", "/dir/y", "/dir/z/1")):
        assert stores.running[number].set(key, key)["value"] == key
    stores.same()
    assert stores.running[1].delete("/a", prevValue="no") is False
    assert stores.running[1].delete("/dir/", recursive=True) is True
    stores.until(lambda: all(list(store.get("", recursive=True)) == ["/a"] for store in stores.running.values()))
    assert stores.running[2].delete("/a") is True
    assert stores.running[2].delete("/a", prevExist=True) is False
    gone = ["/a", "/dir/x", "/dir/y", "/dir/z/1"]
    stores.until(lambda: all(sorted(stores.deleted[number]) == gone for number in range(3)))


def test_one_of_several_nodes_that_compare_by_index_wins(stores: Stores) -> None:
    """When three nodes set a key by the same prevIndex, as for Patroni's leader key, exactly one succeeds."""
    stores.start(0, 1, 2)
    found = stores.running[0].set("/leader", "nobody")
    for turn in range(8):
        stores.until(lambda found=found: all(store.get("/leader") == found for store in stores.running.values()))
        answers: dict[int, Any] = {}

        def race(number: int, answers: dict[int, Any] = answers, found: Any = found, turn: int = turn) -> None:
            answers[number] = stores.running[number].set("/leader", f"{number} in {turn}", prevIndex=found["index"])

        threads = [threading.Thread(target=race, args=(number,)) for number in stores.running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [answer for answer in answers.values() if answer]
        assert len(winners) == 1
        found = winners[0]


def test_keys_expire_by_the_leader_and_its_successor(stores: Stores) -> None:
    """A key with a time to live expires on every node, even if the leader is gone that would have expired it."""
    stores.start(0, 1, 2)
    stores.running[0].set("/short", "1", ttl=1)
    stores.running[0].set("/stays", "1")
    assert set(stores.same()) >= {"/stays"}
    stores.until(lambda: all(store.get("/short") is None for store in stores.running.values()))
    stores.running[1].set("/longer", "1", ttl=3)
    stores.same()
    stores.stop(stores.leader())
    stores.leader()
    stores.until(lambda: all(store.get("/longer") is None for store in stores.running.values()))
    assert set(stores.same()) == {"/stays"}


def test_restarts_installs_and_members_keep_the_store(stores: Stores) -> None:
    """After restarts of one and of all nodes, a lost disk and a new node, keys and indexes are the same."""
    stores.start(0, 1, 2)
    for number in range(30):
        stores.running[number % 3].set(f"/k{number % 7}", str(number))
    before = stores.same()
    stores.stop(1)
    stores.start(1)
    assert stores.same() == before
    for store in stores.running.values():
        store.forceLogCompaction()
    stores.stop(*list(stores.running))
    for number in range(3):  # together, because one alone has no majority
        threading.Thread(target=stores.start, args=(number,)).start()
    stores.until(lambda: len(stores.running) == 3 and all(store.isReady() for store in stores.running.values()))
    assert stores.same() == before
    lost = (stores.leader() + 1) % 3
    stores.stop(lost)
    shutil.rmtree(stores.root / str(lost))
    stores.start(lost)
    assert stores.same() == before
    stores.start(3)  # Patroni adds itself, by PySyncObj's utility
    stores.until(lambda: all(len(store.otherNodes) == 3 for store in stores.running.values()))
    assert stores.running[3].set("/new", "4")["value"] == "4"
    after = stores.same()
    assert {key: after[key] for key in before} == before
    client = stores.module.SyncObjUtility(stores.addresses[:1], stores.running[0].conf)
    assert sorted(client.getMembers()) == sorted(stores.addresses)


def test_patronictl_is_a_read_only_node(stores: Stores) -> None:
    """patronictl's read-only node sees the store, and may write."""
    stores.start(0, 1, 2)
    found = stores.running[0].set("/a", "1")
    client = stores.module.KVStoreTTL(
        None, None, None, commandsWaitLeader=False, patronictl=True, self_addr=stores.addresses[0],
        partner_addrs=stores.addresses[1:3], retry_timeout=10)
    client.startAutoTick()
    try:
        stores.until(lambda: client.get("/a") == found)
        assert client.set("/failover", "2")["value"] == "2"
        stores.until(lambda: all(store.get("/failover") for store in stores.running.values()))
    finally:
        client.destroy()


def test_patronis_class_works(stores: Stores) -> None:
    """Patroni's class works on a cluster of one, with the calls that Patroni makes in its loop."""
    raft = stores.module.Raft({
        "ttl": 30, "scope": "test", "name": "pg", "retry_timeout": 10, "loop_wait": 10,
        "self_addr": stores.addresses[0], "data_dir": str(stores.root / "raft"),
    }, get_mpp({}))  # fmt: skip
    try:
        stores.until(raft._sync_obj.isReady)
        assert raft.touch_member({"version": "4.0.0"})
        assert raft.initialize()
        assert raft.set_config_value("{}")
        assert raft.write_sync_state("foo", "bar", 0)
        assert not raft.write_sync_state("foo", "bar", 0, 1)
        assert raft.attempt_to_acquire_leader()
        cluster = raft.get_cluster()
        assert (cluster.leader.name, [member.name for member in cluster.members]) == ("pg", ["pg"])
        assert raft.update_leader(cluster, 123, failsafe={"foo": "bar"})
        assert raft.get_cluster().status.last_lsn == 123
        assert raft.manual_failover("foo", "bar")
        assert raft.set_history_value("[]")
        assert raft.delete_leader(cluster.leader)
        assert raft.get_cluster().leader is None
        assert raft.delete_cluster()
        assert raft.get_cluster().is_empty()
    finally:
        raft._sync_obj.destroy()
