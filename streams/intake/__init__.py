"""The intake role: validate the records of outside producers, drop duplicates, and key them by adapter."""
