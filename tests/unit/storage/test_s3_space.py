"""A MinIO without room, or over its quota, says so in an error of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from perennial.storage.errors import NoSpaceError, StoreError, StoreUnavailableError
from perennial.storage.objects import s3
from perennial.storage.objects.s3 import MinioStore


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "XMinioAdminBucketQuotaExceeded", NoSpaceError), (507, "XMinioStorageFull", NoSpaceError),
        (503, "SlowDown", StoreUnavailableError), (403, "AccessDenied", StoreError),
    ],
)  # fmt: skip
def test_attack_j_a_full_bucket_is_told_from_one_that_is_away(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, error: type[StoreError]
) -> None:
    monkeypatch.setattr(s3, "_BACKOFF_S", 0)
    body = f"<Error><Code>{code}</Code></Error>".encode()
    http = SimpleNamespace(urlopen=lambda *_, **__: SimpleNamespace(status=status, data=body, headers={}))
    client = SimpleNamespace(get_presigned_url=lambda *_, **__: "http://127.0.0.1:1/x")
    store = MinioStore(client, http, "bucket")  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        store.put_if_absent("jobs/acme/000000000001", b"x")
    assert type(caught.value) is error
    if error is NoSpaceError:
        assert "bucket" in caught.value.remedy
