"""What a client with trusted keys asks of an alias and a version before it serves them."""
