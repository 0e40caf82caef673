"""Manifests, the line of versions of an adapter, aliases, revocations, quarantine and pending deletes."""
