"""The replay buffer of an adapter: which earlier examples have a place in it."""
