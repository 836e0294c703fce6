"""The examples run as their first lines say, within seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Each example, the argument that makes it small, and what its output must say.
RUNS = [
    ("quickstart.py", "", "after a restart: LogId(index=3, term=1) [None, None, None]"),
    ("asyncio_node.py", "5000", "equal to the leader: True"),
    ("threaded_node.py", "2000", "applied: (2000, 1) durable: (2000, 1)"),
    ("numpy_bulk.py", "60000", "out: 60,000 rows"),
    ("cache.py", "200", "after the restart it went on where it was: True"),
    ("metrics.py", "", "fastsm_last_applied_index 1.0"),
    ("web_workers.py", "0.5", "the reads went on: True"),
    ("pysyncobj_cluster.py", "1", "lost: 0"),
    ("patroni_store.py", "2", "what is left: {'/config': '2', '/leader': 'another'}"),
]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Outside of the checkout, with the examples' folder on the path only for imports of their own.
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("name", "size", "says"), RUNS, ids=[name for name, _, _ in RUNS])
def test_an_example_runs(tmp_path: Path, name: str, size: str, says: str) -> None:
    """An example ends without an error, prints what it should, and causes no warning."""
    if name == "metrics.py" and importlib.util.find_spec("prometheus_client") is None:
        pytest.skip("prometheus_client is not installed")
    if name == "web_workers.py" and importlib.util.find_spec("uvicorn") is None:
        pytest.skip("uvicorn is not installed")
    done = run(tmp_path, str(EXAMPLES / name), *([size] if size else []))
    assert (done.returncode, done.stderr) == (0, "")
    assert says in done.stdout


def test_every_example_is_run() -> None:
    """Every example is listed above, so that it is run."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {name for name, _, _ in RUNS}


def test_the_state_machine_of_the_example_conforms(tmp_path: Path) -> None:
    """The test file of the example's own state machine passes, run as a reader would run it."""
    done = run(tmp_path, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(EXAMPLES / "own_state_machine"))
    assert done.returncode == 0, done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(" has no " in line for line in skipped), "what it has is tested"
