"""Turn jobs into versions: read micro-batches, write manifests and blobs, publish, and report where aliases point."""
