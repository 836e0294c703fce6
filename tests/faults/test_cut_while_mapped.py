"""A file that others cut while it is mapped: reading the mapping ends the process by SIGBUS, as the docs say.

`verify` does not read through the mapping, and finds the damage.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import os, random, sys
import fastsm

path, seed = sys.argv[1], int(sys.argv[2])
dice = random.Random(seed)
machine = fastsm.FastStateMachine(path, retain_entries=0, auto_compact=False)
for index in range(1, 41):
    machine.apply([(index, 1, fastsm.put(b"key-%d" % index, dice.randbytes(8_000)))])
if seed % 2:
    machine.compact()
machine.flush()
victim = max((name for name in os.listdir(path) if name.startswith("base" if seed % 2 else "log")), key=len)
size = os.path.getsize(os.path.join(path, victim))
os.truncate(os.path.join(path, victim), dice.randrange(0, min(size, 300_000)))
try:
    machine.verify()
except fastsm.CorruptionError as error:
    assert os.path.basename(error.path) == victim, error
    print("found", flush=True)
machine.get_many([b"key-%d" % index for index in range(1, 41)])
print("read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a mapped file does that was cut differs between systems")
def test_damage_is_found_before_the_mapping_is_touched(tmp_path: Path) -> None:
    """`verify` names the cut file in each of 20 processes; then reads end most of them by SIGBUS."""
    endings = []
    for seed in range(20):
        ended = subprocess.run(
            [sys.executable, "-c", CHILD, tmp_path / str(seed), str(seed)], capture_output=True, text=True, check=False,
            cwd=tmp_path,
        )  # fmt: skip
        assert ended.stdout.startswith("found"), ended.stderr[-2000:]
        assert ended.returncode in (-signal.SIGBUS, 0), ended.stderr[-2000:]
        endings.append(ended.returncode)
    print({code: endings.count(code) for code in set(endings)})
    assert endings.count(-signal.SIGBUS) >= 15
