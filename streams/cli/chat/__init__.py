"""The commands that ask an adapter and set what it is asked with."""
