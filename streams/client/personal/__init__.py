"""Personal adapters: what such an adapter learned itself, served together with the shared adapter that it extends."""
