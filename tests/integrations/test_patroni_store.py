"""The store of ``examples/patroni_store.py``: requirements are checked in log order, and a write is done once."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pysyncobj")

from fastsm.integrations.pysyncobj import SubmitError
from support.cluster import free_ports

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "patroni_store.py"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """Provide a store on a cluster of one; its callbacks' arguments are in `heard`."""
    spec = importlib.util.spec_from_file_location("patroni_store", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["patroni_store"] = module
    spec.loader.exec_module(module)
    heard: list[Any] = []
    made = module.Store(
        f"127.0.0.1:{free_ports(1)[0]}", [], str(tmp_path / "node"), patience=60.0,
        on_set=lambda key, record: heard.append((key, record)), on_delete=lambda key: heard.append((key, None)))
    made.heard = heard
    yield made
    made.node.destroy_synchronous()
    del sys.modules["patroni_store"]


def until(condition: Callable[[], object]) -> None:
    stop = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_requirements_decide_about_a_write(store: Any) -> None:
    """prevExist, prevValue and prevIndex decide whether a set or a deletion takes effect."""
    assert store.set("/a", "1", prevExist=True) is None
    first = store.set("/a", "1", prevExist=False)
    assert first == store.get("/a")
    assert store.set("/a", "2", prevExist=False) is None
    assert store.set("/a", "2", prevValue="x") is None
    assert store.set("/a", "2", prevIndex=first["index"] - 1) is None
    assert store.set("/b", "2", prevIndex=first["index"]) is None
    second = store.set("/a", "2", prevValue="1", prevIndex=first["index"])
    assert second["index"] > first["index"]
    assert store.get_all("") == {"/a": "2"}
    assert not store.delete("/a", prevValue="1")
    assert not store.delete("/a", prevIndex=first["index"])
    assert not store.delete("/b")
    assert store.delete("/a", prevValue="2", prevIndex=second["index"])
    assert store.get("/a") is None
    for name in ("/d/1", "/d/2", "/e"):
        store.set(name, name)
    assert (store.delete_all("/d/"), store.delete_all("/d/"), store.get_all("/")) == (2, 0, {"/e": "/e"})
    assert [(key, record and record["value"]) for key, record in store.heard] == [
        ("/a", "1"), ("/a", "2"), ("/a", None), ("/d/1", "/d/1"), ("/d/2", "/d/2"), ("/e", "/e"), ("/d/1", None),
        ("/d/2", None)]  # fmt: skip


def test_a_key_ends_by_itself(store: Any) -> None:
    """A tick of the leader removes a key whose time is over; a key without a deadline, or set again without, stays."""
    for key, ttl in (("/short", 0.3), ("/stays", None), ("/again", 0.3)):
        assert store.set(key, "1", ttl)
    store.set("/again", "2")
    until(lambda: store.get("/short") is None)
    assert ("/short", None) in store.heard
    assert store.get_all("/") == {"/again": "2", "/stays": "1"}


def test_a_write_whose_answer_is_lost_is_done_once(store: Any) -> None:
    """A write whose answer is lost is submitted again and gets the first answer, not "taken by another"."""
    once, lost = store.node.once, []

    def losing(*arguments: Any, **options: Any) -> Any:
        answer = once(*arguments, **options)
        if len(lost) < 3:
            lost.append(answer)
            raise SubmitError("Timeout")
        return answer

    store.node.once = losing
    record = store.set("/leader", "me", prevExist=False)
    assert record == store.get("/leader")
    assert len(lost) == 3
    assert record["index"] == lost[0].value


def test_a_session_that_has_ended_is_opened_again(store: Any) -> None:
    """After a session has ended, as after a day without a write, a write opens a new one."""
    store.set("/a", "1")
    assert store.node.forget(store._session, sync=True, timeout=30) is True
    assert store.set("/a", "2") == store.get("/a")


def test_after_a_snapshot_all_keys_are_told(store: Any) -> None:
    """After a snapshot is installed, on_set is called for all keys, because any of them may have changed."""
    store.set("/a", "1")
    store.set("/b", "2")
    store.heard.clear()
    store._changed(None)
    assert store.heard == [("/a", store.get("/a")), ("/b", store.get("/b"))]
