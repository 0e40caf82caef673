"""The retain agent: carry retention requests from acceptance to their end."""
