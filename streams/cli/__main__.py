"""Run `python -m perennial.streams.cli`, which is the same as the installed command `perennial`."""

from perennial.streams.cli.app import main

main()
