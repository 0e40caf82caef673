"""Find what the documents of an update share, so that it is trained once."""
