"""What the tests of integrations leave behind: nothing that another test of the same process would carry along."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

from support.cluster import release_ports


@pytest.fixture(autouse=True)
def _nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ports that were held are given back, and so are the pipes that PySyncObj's own nodes leave open."""
    pipes: list[Any] = []
    if importlib.util.find_spec("pysyncobj") is not None:
        import pysyncobj.syncobj  # noqa: PLC0415

        class Noted(pysyncobj.syncobj.PipeNotifier):  # type: ignore[misc]
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                pipes.append(self)

        monkeypatch.setattr(pysyncobj.syncobj, "PipeNotifier", Noted)
    yield
    for pipe in pipes:
        for end in (pipe._PipeNotifier__pipeR, pipe._PipeNotifier__pipeW):
            if end >= 0:  # else a node of fastsm's has closed it
                os.close(end)
    release_ports()
