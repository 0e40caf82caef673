"""The stores that the contract suites run on: memory, a folder, and MinIO with a plain and a versioned bucket."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.object_store import ObjectStore
from perennial.storage.objects.s3_settings import S3Settings
from tests.memory_store import MemoryStore
from tests.services import start_minio

StoreFactory = Callable[[], ObjectStore]


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """How to reach the S3 server that PERENNIAL_TEST_S3_ENDPOINT names, else a MinIO child process."""
    outside = os.environ.get("PERENNIAL_TEST_S3_ENDPOINT")
    if outside:
        yield {**os.environ, "PERENNIAL_S3_ENDPOINT": outside}
        return
    server = start_minio(tmp_path_factory.mktemp("minio"))
    try:
        yield server.environment()
    finally:
        server.stop()


@pytest.fixture(params=["memory", "directory", "minio", "minio-versioned"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> StoreFactory:
    """Opens the same empty store again and again, as several processes would."""
    if request.param == "memory":
        memory = MemoryStore()
        return lambda: memory
    if request.param == "directory":
        return lambda: DirectoryStore(tmp_path / "store", fsync=False)
    environment = request.getfixturevalue("s3_environment")
    uri = f"s3://perennial-{uuid.uuid4().hex[:12]}/some/prefix"

    def opened() -> ObjectStore:
        return open_store(uri, S3Settings.from_env(environment))

    first = opened()
    first.probe()
    if request.param == "minio-versioned":
        from minio.versioningconfig import ENABLED, VersioningConfig

        first._client.set_bucket_versioning(first._bucket, VersioningConfig(ENABLED))
    return opened


@pytest.fixture
def store(make_store: StoreFactory) -> ObjectStore:
    """An empty store."""
    return make_store()
