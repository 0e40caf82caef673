"""The events of every topic as pydantic models, their encoding as CloudEvents, and dead letters."""
