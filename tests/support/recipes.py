"""An importer for the recipes of ``examples/recipes``, which is not a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).resolve().parent.parent.parent / "examples" / "recipes"


def recipe(name: str) -> ModuleType:
    """Return the module of a recipe; it is imported once, under a name in ``sys.modules``."""
    full = f"recipe_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, RECIPES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]
