"""Build of the compiled modules; all other metadata is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILED = {
    "": "background long_work answers command distinct columns",
    "disk": "hashing format headers snapshot_header descriptors parts mapping torn_tail published",
    "lookup": "table terms dead deadlines sorting tree tree_changes order ranges index",
    "generation": "recovery framefile log steps changes saved_order saved_table loaded_table",
    "snapshot": "capture",
    "core": "watchers awaited frozen status state ordered timed turns scratch view ranging expiring tx judging chunk "
            "group_commit hard_state engine jobs matching",
    "journal": "format entries segment segments recovery journal engine",
    "reading": "frames following change_source",
    "integrations.pysyncobj": "positions",
}
MODULES = [
    ".".join(filter(None, ["fastsm", folder, name])) for folder, names in COMPILED.items() for name in names.split()
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
                name, [name.replace(".", "/") + ".pyx"], extra_compile_args=COMPILE_ARGS, extra_link_args=LINK_ARGS,
            )
            for name in MODULES
        ],
        compiler_directives=DIRECTIVES,
        annotate=os.environ.get("FASTSM_ANNOTATE") == "1",
    ),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
