"""Texts that an adapter is asked with."""
