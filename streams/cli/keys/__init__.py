"""The commands `perennial keys`."""
