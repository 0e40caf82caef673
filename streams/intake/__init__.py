"""The intake role: validate what producers publish, drop repeats, re-key by adapter."""
