"""When to cut a micro-batch: the bounds, and how far drift of an adapter is trusted."""
