"""The command ``fastsm``, a thin layer over the rest of the package. Each group of commands has a module."""

from fastsm.cli import bench, demo, look, move, upkeep, watch
from fastsm.cli.app import app

__all__ = ["app", "bench", "demo", "look", "move", "upkeep", "watch"]
