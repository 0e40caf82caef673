"""`python -m perennial.streams.cli`: the same as the installed `perennial`."""

from perennial.streams.cli.app import main

main()
