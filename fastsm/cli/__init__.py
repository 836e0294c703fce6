"""The command ``fastsm``: draws what the modules below it do. A module for each group of commands."""

from fastsm.cli import demo, look, move, upkeep
from fastsm.cli.app import app

__all__ = ["app", "demo", "look", "move", "upkeep"]
