"""Serving of adapter versions with torch, and measurement of stored versions."""
