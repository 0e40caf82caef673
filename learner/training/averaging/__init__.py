"""Averages of what updates trained."""
