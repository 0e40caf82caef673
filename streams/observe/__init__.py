"""Metrics, health, and the HTTP server that exposes both."""
