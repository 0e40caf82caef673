"""The command line `perennial`: the only part that may import everything, each part inside its own command."""

from perennial.streams.cli.app import app, main

__all__ = ["app", "main"]
