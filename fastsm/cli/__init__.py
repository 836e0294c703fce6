"""The command ``fastsm``: draws what the modules below it do. A module for each group of commands."""

from fastsm.cli import bench, demo, look, move, upkeep, watch
from fastsm.cli.app import app

__all__ = ["app", "bench", "demo", "look", "move", "upkeep", "watch"]
