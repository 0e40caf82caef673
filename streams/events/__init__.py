"""The events of every topic as pydantic models, their CloudEvents encoding, and dead letters."""
