"""What the tests of integrations leave behind: nothing that another test of the same process would carry along."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.cluster import release_ports


@pytest.fixture(autouse=True)
def _no_port_is_held() -> Iterator[None]:
    """Ports that a test has found are given back at its end."""
    yield
    release_ports()
