"""Dead letters: read them, select them, and send them back to their topics (redrive)."""
