"""Versions of adapters: manifests, aliases, revocations, quarantine and pending deletes."""
