"""Run the command line: `python -m perennial` does the same as the installed command `perennial`."""

from perennial.streams.cli.app import main

main()
