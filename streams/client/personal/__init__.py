"""Serve a personal adapter together with the shared adapter that it extends."""
