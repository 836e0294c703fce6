"""Fixtures that clean up after each test of the integrations, so that later tests of the process are not affected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.cluster import release_ports


@pytest.fixture(autouse=True)
def _no_port_is_held() -> Iterator[None]:
    """Release the ports that a test has found at its end."""
    yield
    release_ports()
