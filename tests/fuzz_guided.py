"""Fuzzes one target guided by coverage: ``python tests/fuzz_guided.py logs [-max_total_time=600 …]``.

Needs the package ``atheris``. Its bytes are the decisions by which an input is drawn, so that inputs get past
checksums; coverage is that of the plain reader and of the library's decoders in Python. After the target come
libFuzzer's options and, optionally, a folder for the interesting inputs.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent))

with atheris.instrument_imports(
    include=["support.page_reader", *(f"fastsm.snapshot.{name}" for name in ("file", "flat", "codec", "receiver"))]
):
    from support.fuzz_worker import TARGETS, corpus_of

from support.faulty import memory_directory
from support.mutation import Stream


def main() -> None:
    logging.getLogger("fastsm").setLevel(logging.CRITICAL + 1)
    name = sys.argv.pop(1)
    with memory_directory() as root:
        target = TARGETS[name](root, list(corpus_of(name).values()))

        def run(data: bytes) -> None:
            dice = Stream(data)
            target.run(target.draw(dice), dice)

        atheris.Setup([*sys.argv, "-len_control=0", "-max_len=4096"], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
