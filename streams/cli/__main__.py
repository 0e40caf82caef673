"""`python -m streams.cli`: the same as the installed `perennial`."""

from streams.cli.app import main

main()
