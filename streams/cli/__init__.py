"""The command line: `perennial`. The only place that may import everything, each part inside its command."""

from perennial.streams.cli.app import app, main

__all__ = ["app", "main"]
