"""Backends that serve adapter versions with torch, and the evaluation of versions."""
