"""Other libraries, imported when they are first needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastsm.errors import ReentryError

_imported: dict[str, ModuleType] = {}


def library(name: str) -> ModuleType:
    """Returns a module, imported whole.

    A signal handler or a finalizer may run in the middle of its own thread's import of it, and would be given half a
    module: that is a ``ReentryError``. An import that another thread has begun is waited for. ``ImportError`` where
    there is none.
    """
    found = _imported.get(name)
    if found is not None:
        return found
    module = importlib.import_module(name)
    if getattr(module.__spec__, "_initializing", False):
        raise ReentryError(
            f"this thread is in the middle of importing {name}: a signal handler or a finalizer cannot use it then. "
            "Nothing was done; do it after that import, or import it at the start")
    _imported[name] = module
    return module
