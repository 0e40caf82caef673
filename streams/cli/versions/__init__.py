"""The commands that look at the versions of adapters, or delete the weights of old ones."""
