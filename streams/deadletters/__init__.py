"""Dead letters: read and select them, and send them back to the topics that they came from (redrive)."""
