"""Other libraries, imported when first needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastsm.errors import ReentryError

_imported: dict[str, ModuleType] = {}


def library(name: str) -> ModuleType:
    """Returns a module that is completely imported.

    A signal handler or a finalizer may run while its own thread is importing the module, and would get half of it: that
    is a ``ReentryError``. Waits for an import that another thread has begun. ``ImportError`` if there is no such
    module.
    """
    found = _imported.get(name)
    if found is not None:
        return found
    module = importlib.import_module(name)
    if getattr(module.__spec__, "_initializing", False):
        raise ReentryError(
            f"this thread is in the middle of importing {name}: a signal handler or a finalizer cannot use it during "
            "that. Nothing was done; try again after that import, or import the module when the program starts")
    _imported[name] = module
    return module
