"""What every object store must do, run on each of them; and what only one of them can get wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, StoreError, StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.factory import open_store
from perennial.storage.objects.keys import blob_key, check_key, digest_of, key_of, stored_name
from perennial.storage.objects.object_store import ObjectStore, get_blob, put_blob
from perennial.storage.objects.s3 import open_minio
from perennial.storage.objects.s3_settings import S3Settings

WRITERS = 32
ROUNDS = 20
StoreFactory = Callable[[], ObjectStore]
segments = st.from_regex(r"[A-Za-z0-9_@=:-][A-Za-z0-9._@=:-]{0,8}", fullmatch=True)
keys = st.lists(segments, min_size=1, max_size=4).map("/".join)


def race(actions: list[Callable[[], bool]]) -> int:
    """Run all at once; how many won."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], bool]) -> bool:
        barrier.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return sum(pool.map(run, actions))


def swaps(store: ObjectStore, key: str, data: bytes, expected: str | None) -> bool:
    try:
        store.compare_and_swap(key, data, expected)
    except ConflictError:
        return False
    return True


def test_an_object_is_created_once(store):
    assert store.put_if_absent("a/b", b"first")
    assert not store.put_if_absent("a/b", b"second")
    assert store.get("a/b").data == b"first"


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_bytes_come_back_as_they_were(store, size):
    data = random.Random(size).randbytes(size)
    assert store.put_if_absent("a", data)
    assert store.get("a").data == data


def test_what_is_not_there_is_said_so(store):
    assert not store.exists("a/b")
    assert not store.delete("a/b")
    with pytest.raises(NotFoundError):
        store.get("a/b")
    assert list(store.list("")) == []


def test_compare_and_swap_needs_the_last_etag(store):
    first = store.compare_and_swap("a", b"1", None)
    with pytest.raises(ConflictError) as absent:
        store.compare_and_swap("a", b"2", None)
    assert absent.value.remedy
    second = store.compare_and_swap("a", b"2", first)
    with pytest.raises(ConflictError):
        store.compare_and_swap("a", b"3", first)
    with pytest.raises(ConflictError):
        store.compare_and_swap("nothing", b"3", first)
    assert store.get("a").data == b"2"
    assert store.get("a").etag == second
    assert not store.exists("nothing")


def test_a_created_object_can_be_swapped_by_the_etag_it_is_read_with(store):
    store.put_if_absent("a", b"1")
    store.compare_and_swap("a", b"2", store.get("a").etag)
    assert store.get("a").data == b"2"


def test_a_key_may_be_an_object_and_a_folder(store):
    for key in ("state/acme", "state/acme/support", "x/y/z", "x/y", "x"):
        assert store.put_if_absent(key, key.encode())
    assert list(store.list("")) == ["state/acme", "state/acme/support", "x", "x/y", "x/y/z"]
    assert store.delete("x/y")
    assert list(store.list("x")) == ["x", "x/y/z"]
    assert store.get("x/y/z").data == b"x/y/z"


def test_lists_are_sorted_and_start_where_told(store):
    wanted = sorted(
        ["a", "a-b", "a.b", "a/1", "a/10", "a/2", "a/b/c", "a:b", "aa", "b", blob_key("sha256:" + "0" * 64)]
    )
    for key in random.Random(5).sample(wanted, len(wanted)):
        store.put_if_absent(key, b"x")
    assert list(store.list("")) == wanted
    for prefix in ("a", "a/", "a/1", "a/b/", "b", "blobs/", "zz"):
        assert list(store.list(prefix)) == [key for key in wanted if key.startswith(prefix)]
    for last in [*wanted, "a/", "a/3", "zz"]:
        assert list(store.list("", start_after=last)) == [key for key in wanted if key > last]
    assert list(store.list("a/", start_after="a/10")) == ["a/2", "a/b/c"]


def test_a_list_longer_than_a_page_is_whole(store):
    wanted = [f"many/{i:06d}" for i in range(1205)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.put_if_absent(key, b""), wanted))
    assert list(store.list("many/")) == wanted


def test_a_reader_bounds_what_it_takes(store):
    store.put_if_absent("a", b"x" * 1000)
    assert len(store.get("a", max_bytes=1000).data) == 1000
    with pytest.raises(StoreError) as refused:
        store.get("a", max_bytes=999)
    assert "1000" in str(refused.value)


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/..", ".locks/0001", "a/.b", "a\x00b", "a b", "é", "a+",
     "a\n", "a\\b", "x" * 201, "/".join(["x" * 100] * 11), "blobs/sha256/x",
      "blobs/sha256/" + "0" * 64 + "/x"],
)  # fmt: skip
def test_keys_that_could_leave_the_store_are_refused(store, key):
    for call in (
        store.get, store.exists, store.delete, lambda k: store.put_if_absent(k, b""),
        lambda k: store.compare_and_swap(k, b"", None),
    ):  # fmt: skip
        with pytest.raises(StoreError) as refused:
            call(key)
        assert not isinstance(refused.value, NotFoundError)
        assert refused.value.allowed


@pytest.mark.parametrize("prefix", ["../", "/", "a/../", ".locks/", "a//", "a+"])
def test_prefixes_that_could_leave_the_store_are_refused(store, prefix):
    with pytest.raises(StoreError):
        list(store.list(prefix))


@given(st.lists(keys, unique=True, max_size=20))
@settings(max_examples=200, deadline=None)
def test_stored_names_are_unique_sort_like_keys_and_lead_back(found):
    names = [stored_name(key) for key in sorted(found)]
    assert names == sorted(names)
    assert [key_of(name) for name in names] == sorted(found)
    files, folders = (
        set(names),
        {name.rsplit("/", n)[0] for name in names for n in range(1, name.count("/") + 1)},
    )
    assert not files & folders
    assert all(check_key(key) == key for key in found)


def test_one_of_many_creators_wins(make_store):
    stores = [make_store() for _ in range(4)]
    for number in range(ROUNDS):
        key = f"races/create-{number}"
        creators = [partial(stores[i % 4].put_if_absent, key, b"%d" % i) for i in range(WRITERS)]
        assert race(creators) == 1


def test_one_of_many_swappers_wins(make_store):
    stores = [make_store() for _ in range(4)]
    etag = None
    for number in range(ROUNDS):
        swappers = [partial(swaps, stores[i % 4], "races/swap", b"%d %d" % (number, i), etag) for i in range(WRITERS)]
        assert race(swappers) == 1
        etag = stores[0].get("races/swap").etag


def test_no_swap_is_lost_where_writers_read_again(make_store):
    stores = [make_store() for _ in range(4)]
    stores[0].put_if_absent("counter", b"0 start")

    def add(writer: int) -> bool:
        for _ in range(5):
            while True:
                found = stores[writer % 4].get("counter")
                following = b"%d %d" % (int(found.data.split()[0]) + 1, writer)
                if swaps(stores[writer % 4], "counter", following, found.etag):
                    break
        return True

    race([partial(add, i) for i in range(8)])
    assert stores[0].get("counter").data.split()[0] == b"40"


def test_a_deleted_object_leaves_nothing(store):
    etag = store.compare_and_swap("a/b", b"version one", None)
    store.compare_and_swap("a/b", b"version two", etag)
    store.put_if_absent("a/b/c", b"stays")
    store.put_if_absent("a/bb", b"stays")
    assert store.delete("a/b")
    assert not store.exists("a/b")
    assert not store.delete("a/b")
    assert list(store.list("")) == ["a/b/c", "a/bb"]
    if hasattr(store, "_client"):
        left = store._client.list_objects(store._bucket, recursive=True, include_version=True)
        assert {entry.object_name.rpartition("prefix/")[2] for entry in left} == {"a/b/c+", "a/bb+"}
    assert store.put_if_absent("a/b", b"again")


def test_the_probe_passes_and_leaves_nothing(store):
    store.probe()
    assert list(store.list("")) == []


def test_blobs_are_named_by_their_bytes(store):
    digest = put_blob(store, b"weights")
    assert digest == digest_of(b"weights") == put_blob(store, b"weights")
    assert get_blob(store, digest) == b"weights"
    with pytest.raises(IntegrityError):
        get_blob(store, "sha256:../../etc/passwd")
    with pytest.raises(NotFoundError):
        get_blob(store, digest_of(b"other"))


def test_flipped_bytes_are_refused(store):
    rng = random.Random(7)
    data = rng.randbytes(4096)
    key = blob_key(put_blob(store, data))
    etag = store.get(key).etag
    for _ in range(100):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        etag = store.compare_and_swap(key, bytes(broken), etag)
        with pytest.raises(IntegrityError):
            get_blob(store, digest_of(data))


# ---- the directory alone

CHILD = """
import sys, time, json
from pathlib import Path
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.errors import ConflictError
root, writer, rounds, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
store = DirectoryStore(Path(root), fsync=False)
while time.time() < start:
    pass
won = []
for number in range(rounds):
    created = store.put_if_absent(f"create/{number}", writer.encode())
    try:
        store.compare_and_swap(f"swap/{number}", writer.encode(), None)
        swapped = True
    except ConflictError:
        swapped = False
    won.append([created, swapped])
print(json.dumps(won))
"""


def test_one_of_four_processes_wins(tmp_path):
    import time

    root = Path(__file__).parents[3]
    start = str(time.time() + 1.5)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), str(i), "200", start],
            stdout=subprocess.PIPE,
            cwd=root,
        )
        for i in range(4)
    ]
    results = [json.loads(child.communicate()[0]) for child in children]
    for number in range(200):
        assert [sum(result[number][kind] for result in results) for kind in (0, 1)] == [1, 1], number


def test_locks_temporaries_and_strangers_are_not_listed(tmp_path):
    store = DirectoryStore(tmp_path)
    store.compare_and_swap("a", b"2", store.compare_and_swap("a", b"1", None))
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "README").write_text("a stranger")
    (tmp_path / ".tmp" / "left").write_text("of a crash")
    assert list(store.list("")) == ["a"]


def test_weights_can_be_opened_by_their_address(tmp_path):
    store = DirectoryStore(tmp_path)
    digest = put_blob(store, b"weights")
    assert store.uri == tmp_path.as_uri()
    assert (tmp_path / blob_key(digest)).read_bytes() == b"weights"


def test_without_unnamed_files_the_store_works_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    store = DirectoryStore(tmp_path)
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    assert store.get("a").data == b"1"
    assert list((tmp_path / ".tmp").iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.errors import StoreUnavailableError
store = DirectoryStore(Path(sys.argv[1]))
etag = store.compare_and_swap("old", b"as it was", None)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
big = b"x" * 9999
for write in (lambda: store.put_if_absent("new", big), lambda: store.compare_and_swap("old", big, etag)):
    try:
        write()
    except StoreUnavailableError as error:
        print(error.remedy)
"""


def test_a_write_that_finds_no_room_leaves_the_store_as_it_was(tmp_path):
    root = Path(__file__).parents[3]
    output = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    assert output.count("free or add space") == 2
    store = DirectoryStore(tmp_path)
    assert list(store.list("")) == ["old"]
    assert store.get("old").data == b"as it was"
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_deleted_payload_is_nowhere_under_the_folder(tmp_path):
    store = DirectoryStore(tmp_path)
    store.compare_and_swap("a/b", b"PAYLOAD 2", store.compare_and_swap("a/b", b"PAYLOAD 1", None))
    store.delete("a/b")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"PAYLOAD" in path.read_bytes()]
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="the store's address is no folder") as refused:
        DirectoryStore(tmp_path / "file" / "store")
    assert not isinstance(refused.value, StoreUnavailableError)  # waiting does not help
    assert refused.value.remedy


def test_addresses(tmp_path):
    assert open_store(str(tmp_path / "a b")).uri == (tmp_path / "a b").as_uri()
    assert open_store((tmp_path / "a b").as_uri()).uri == (tmp_path / "a b").as_uri()
    for address in ("", "http://somewhere", "file://other/host", "s4://bucket"):
        with pytest.raises(StoreError) as refused:
            open_store(address)
        assert refused.value.remedy


# ---- S3 alone

KEYS = {"PERENNIAL_S3_ACCESS_KEY": "access", "PERENNIAL_S3_SECRET_KEY": "s3cr3t"}


class Deaf(urllib3.PoolManager):
    """A proxy that loses conditions on the way, as servers do that do not know them."""

    def urlopen(self, method, url, *args: Any, headers=None, **kwargs: Any):
        kept = {name: value for name, value in (headers or {}).items() if not name.lower().startswith("if-")}
        return super().urlopen(method, url, *args, headers=kept, **kwargs)


class Dropping(urllib3.PoolManager):
    """Loses answers: the server did what it was asked, and the client never hears of it."""

    losing = 0

    def urlopen(self, method, url, *args: Any, **kwargs: Any):
        answer = super().urlopen(method, url, *args, **kwargs)
        if method == "PUT" and self.losing:
            self.losing -= 1
            raise urllib3.exceptions.ProtocolError("connection reset")
        return answer


def test_a_server_that_ignores_conditions_is_refused(s3_environment):
    with Deaf() as pool:
        store = open_minio("s3://perennial-deaf/x", S3Settings.from_env(s3_environment), pool)
        with pytest.raises(StoreError) as refused:
            store.probe()
        assert "RELEASE.2025-09-07T16-13-09Z" in refused.value.remedy
        assert list(store.list("")) == []


def test_a_lost_answer_is_resolved_by_reading_back(s3_environment):
    with Dropping(retries=False) as pool:
        store = open_minio("s3://perennial-dropping/x", S3Settings.from_env(s3_environment), pool)
        store.probe()
        pool.losing = 3
        etag = store.compare_and_swap("a", b"mine 1", None)
        assert store.get("a").etag == etag
        store.compare_and_swap("a", b"mine 2", etag)
        with pytest.raises(ConflictError):
            store.compare_and_swap("a", b"mine 3", etag)
        pool.losing = 1
        assert not store.put_if_absent("b", b"mine")
        assert store.get("b").data == b"mine"
        store.delete("a")
        store.delete("b")


def test_no_server_is_said_so_without_leaking_a_signature():
    store = open_store("s3://bucket/x", S3Settings.from_env({**KEYS, "PERENNIAL_S3_ENDPOINT": "http://127.0.0.1:9"}))
    for call in (lambda: store.put_if_absent("a", b""), lambda: store.compare_and_swap("a", b"", None),
                 lambda: store.get("a"), lambda: list(store.list(""))):  # fmt: skip
        with pytest.raises(StoreUnavailableError) as refused:
            call()
        assert "PERENNIAL_S3_ENDPOINT" in refused.value.remedy
        assert "Signature" not in str(refused.value)
        assert "access" not in str(refused.value)


def test_wrong_credentials_are_said_so(s3_environment):
    store = open_store(
        "s3://perennial-denied/x", S3Settings.from_env({**s3_environment, "PERENNIAL_S3_SECRET_KEY": "wrong-secret"})
    )
    for call in (lambda: store.put_if_absent("a", b""), lambda: store.get("a"), store.probe):
        with pytest.raises(StoreError) as refused:
            call()
        assert "SECRET_KEY" in refused.value.remedy
        assert "wrong-secret" not in str(refused.value)


def test_a_missing_bucket_is_said_so(s3_environment):
    store = open_store("s3://perennial-missing/x", S3Settings.from_env(s3_environment))
    with pytest.raises(StoreError) as refused:
        store.put_if_absent("a", b"")
    assert "perennial-missing" in refused.value.remedy


def test_settings_come_from_files_and_from_the_usual_names(tmp_path):
    (tmp_path / "access").write_text("from-file\n")
    (tmp_path / "secret").write_text("s3cr3t\n")
    files = {
        "PERENNIAL_S3_ACCESS_KEY_FILE": str(tmp_path / "access"),
        "PERENNIAL_S3_SECRET_KEY_FILE": str(tmp_path / "secret"),
    }
    usual = {"AWS_ACCESS_KEY_ID": "from-aws", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "eu-central-1"}

    def opened(env: dict[str, str]) -> str:
        store = open_minio("s3://bucket/some/prefix/", S3Settings.from_env(env))
        assert store.uri == "s3://bucket/some/prefix"
        return store._client.get_presigned_url("GET", "bucket", "x")

    assert "from-file" in opened(files)
    assert "from-file" in opened({**files, **usual})
    assert "from-aws" in opened(usual)
    assert "eu-central-1" in opened(usual)
    assert "eu-north-1" in opened({**usual, "PERENNIAL_S3_REGION": "eu-north-1"})
    assert opened({**KEYS, "PERENNIAL_S3_ENDPOINT": "host:9000"}).startswith("https://host:9000/")
    assert opened({**KEYS, "PERENNIAL_S3_ENDPOINT": "http://host:9000"}).startswith("http://host:9000/")
    assert opened({**KEYS, "PERENNIAL_S3_ENDPOINT": "host:9000", "PERENNIAL_S3_SECURE": "0"}).startswith("http:")


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"PERENNIAL_S3_ACCESS_KEY": "a"},
        {**KEYS, "PERENNIAL_S3_SECURE": "perhaps"},
        {**KEYS, "PERENNIAL_S3_ENDPOINT": "ftp://host"},
        {**KEYS, "PERENNIAL_S3_ENDPOINT": "http://user:s3cr3t@host"},
        {"PERENNIAL_S3_ACCESS_KEY": "a", "PERENNIAL_S3_SECRET_KEY_FILE": "/nowhere/secret"},
    ],
)
def test_settings_that_are_not_usable_are_said_so(env):
    with pytest.raises(StoreError) as refused:
        open_store("s3://bucket/x", S3Settings.from_env(env))
    assert refused.value.remedy
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize("uri", ["s3://", "s3://B/x", "s3://bucket/../x", "s3://bucket/a b"])
def test_bucket_addresses_that_are_not_usable_are_said_so(uri):
    with pytest.raises(StoreError):
        open_store(uri, S3Settings.from_env(KEYS))


@pytest.mark.parametrize("uri", ["s3://AKIA:s3cr3t@bucket/x", "https://me:s3cr3t@host/bucket", "s3://s3cr3t@bucket"])
def test_credentials_in_an_address_are_refused_and_not_shown(uri):
    with pytest.raises(StoreError, match="credentials") as refused:
        open_store(uri, S3Settings.from_env(KEYS))
    assert "s3cr3t" not in str(refused.value)
