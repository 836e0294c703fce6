"""Build of the compiled modules; all other metadata is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = [
    "background", "long_work", "answers", "command", "distinct", "columns",
    *(
        f"disk.{name}"
        for name in ("hashing", "format", "headers", "descriptors", "parts", "mapping", "tail", "published")),
    *(f"lookup.{name}" for name in ("table", "terms", "dead", "deadlines", "sorting", "tree", "tree_changes")),
    *(f"lookup.{name}" for name in ("order", "ranges", "index")),
    *(f"generation.{name}" for name in ("recovery", "framefile", "log", "steps", "changes")),
    *(f"generation.{name}" for name in ("saved_order", "saved_table", "loaded_table")),
    "snapshot.capture", "core.watchers",
    *(f"core.{name}" for name in ("awaited", "frozen", "status", "state", "ordered", "timed", "turns", "scratch")),
    *(f"core.{name}" for name in ("view", "ranging", "expiring", "tx", "judging", "chunk", "group_commit")),
    *(f"core.{name}" for name in ("hard_state", "engine", "jobs")),
    "core.matching", *(f"reading.{name}" for name in ("frames", "following", "tail")),
    *(f"journal.{name}" for name in ("format", "entries", "segment", "segments", "recovery", "journal", "engine")),
    "integrations.pysyncobj.positions",
]

DIRECTIVES = {
    "language_level": 3,
    "cdivision": True,
    # Signatures in the form that CPython reads, so that inspect.signature, help() and IDEs show them.
    "embedsignature": True,
    "embedsignature.format": "clinic",
    # A bound Cython function costs 3 ns a call more than a plain C method.
    "binding": False,
    # An argument of a compiled type is never None, unless it says so: None has no fields, and a look at one is a crash.
    "allow_none_for_extension_args": False,
}

# FASTSM_DEBUG=1 builds without optimization and with C assertions.
# FASTSM_SANITIZE=address,undefined or =thread builds with those sanitizers; CONTRIBUTING.md says how to run them.
DEBUG = os.environ.get("FASTSM_DEBUG") == "1"
SANITIZE = os.environ.get("FASTSM_SANITIZE", "")
COMPILE_ARGS = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0", "-fno-strict-aliasing"]
LINK_ARGS = []
if SANITIZE:
    LINK_ARGS = [f"-fsanitize={SANITIZE}"]
    COMPILE_ARGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", *LINK_ARGS]

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"fastsm.{name}", [f"fastsm/{name.replace('.', '/')}.pyx"],
                extra_compile_args=COMPILE_ARGS, extra_link_args=LINK_ARGS,
            )
            for name in MODULES
        ],
        compiler_directives=DIRECTIVES,
        annotate=os.environ.get("FASTSM_ANNOTATE") == "1",
    ),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
