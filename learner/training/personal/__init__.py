"""Personal adapters: an own part that is trained and served on top of a shared adapter."""
