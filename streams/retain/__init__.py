"""The retain role: carry retention requests from acceptance to their end."""
