"""Ed25519 signatures of manifests, aliases, events and acknowledgements, and the keys for them."""
