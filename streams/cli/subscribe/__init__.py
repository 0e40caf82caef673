"""The command `perennial subscribe`."""
