"""In-memory doubles for tests of code that uses this package: a publisher, a backend, and small versions to serve."""

from perennial.streams.client.testing import MemoryBackend, MemoryPublisher, publish_version, small_weights

__all__ = ["MemoryBackend", "MemoryPublisher", "publish_version", "small_weights"]
