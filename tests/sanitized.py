"""Runs Python on modules that were built with sanitizers: ``python -m tests.sanitized address,undefined -m pytest -q``.

Build with the same sanitizers first: ``FASTSM_SANITIZE=address,undefined pip install -e .``. The other arguments are
Python's. Reports of any process of the run are printed at the end and make the status 1. Linux and GCC only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# In this order, because a process must load the address sanitizer's library first.
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}
OPTIONS = {
    # Python does not free everything when it exits. Tests ask for too much memory, and expect a MemoryError.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:log_path={reports}",
    # This sanitizer reports only to standard error, which pytest must not capture.
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "PYTEST_ADDOPTS": "--capture=sys",
    # Children that tests fork start threads of their own.
    "TSAN_OPTIONS": "history_size=4:die_after_fork=0:suppressions={tests}/support/thread_sanitizer.txt:"
                    "log_path={reports}",
    # Python's own allocator would hide its blocks from the sanitizer.
    "PYTHONMALLOC": "malloc",
}


def library(name: str) -> str:
    """Return the path of a runtime library of the compiler."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return os.path.realpath(found.stdout.strip())


def environment(words: list[str], reports: Path) -> dict[str, str]:
    """Return the environment for processes, and their children, that load modules built with these sanitizers."""
    preload = [library(LIBRARIES[word]) for word in LIBRARIES if word in words]
    options = {name: option.format(reports=reports / "report", tests=TESTS) for name, option in OPTIONS.items()}
    # Tests that measure memory look at the last variable: a sanitizer keeps freed memory.
    return {**os.environ, **options, "LD_PRELOAD": " ".join(preload), "FASTSM_SANITIZED": ",".join(words)}


def is_sanitized(words: list[str], environ: dict[str, str]) -> bool:
    """Return whether the modules that a test would import were built with these sanitizers."""
    program = "import fastsm.core.engine; print(fastsm.core.engine.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", program], env=environ, cwd="/", capture_output=True, text=True, check=True)
    content = Path(found.stdout.strip()).read_bytes()
    symbols = {"address": b"__asan_init", "thread": b"__tsan_init", "undefined": b"__ubsan_handle"}
    return all(symbols[word] in content for word in words)


def main() -> int:
    words, arguments = sys.argv[1].split(","), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        environ = environment(words, Path(folder))
        if not is_sanitized(words, environ):
            print(f"fastsm is not built with {sys.argv[1]}: FASTSM_SANITIZE={sys.argv[1]} pip install -e .")
            return 2
        status = subprocess.run([sys.executable, *arguments], env=environ, check=False).returncode
        reports = sorted(Path(folder).iterdir())
        for report in reports:
            print(report.read_text(encoding="utf-8", errors="replace"))
        print(f"{len(reports)} processes reported something")
        return status or int(bool(reports))


if __name__ == "__main__":
    sys.exit(main())
