"""Jobs to versions: read micro-batches, write manifests and blobs, publish and announce aliases."""
