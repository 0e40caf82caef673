"""When to cut a micro-batch."""
