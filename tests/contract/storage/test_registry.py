"""Publishing, aliases and revocations on every store: cut off or raced anywhere, one line comes out."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from perennial.storage.errors import ConflictError, IntegrityError, NotFoundError, StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import ObjectStore, get_blob, put_blob
from perennial.storage.registry.manifest import BlobRef, LearnedExample, Manifest
from perennial.storage.registry.registry import Head, Publication, Registry, manifest_key, update_id

ADAPTER = "acme/support"
STEPS = ("blobs", "verify", "manifest", "claim_update", "claim_seq", "gate", "alias")
StoreFactory = Callable[[], ObjectStore]


class Cut(BaseException):
    """The process ends here."""


def tensors(seed: int, size: int = 32) -> bytes:
    return save({"a": np.random.default_rng(seed).standard_normal(size).astype(np.float32)})


def ref(data: bytes) -> BlobRef:
    return BlobRef(digest=digest_of(data), size_bytes=len(data))


def make_registry(store: ObjectStore, cut_at: str = "") -> Registry:
    ticks = itertools.count()

    def failpoint(name: str) -> None:
        if name == f"publish.{cut_at}":
            raise Cut(name)

    return Registry(
        store,
        nonce=lambda: os.urandom(8).hex(),
        now=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(ticks)),
        failpoint=failpoint,
    )


def make(
    head: Head | None, offset: int, adapter: str = ADAPTER, seed: int | None = None, **changes: object
) -> tuple[Manifest, list[bytes]]:
    """The next version after `head`, having learned up to `offset`, and its blobs."""
    weights, optimizer, replay = tensors(seed or offset), tensors(1000 + offset), b'["replay"]'
    parent = head.version if head else None
    marks = {"cluster/topic/documents/0": offset}
    values: dict[str, object] = {
        "adapter": adapter,
        "seq": head.seq + 1 if head else 1,
        "kind": "update",
        "outcome": "promoted",
        "parent": parent,
        "head": parent,
        "update_id": update_id(adapter, parent, marks, {"rank": 8}),
        "job_id": f"job-{offset}",
        "base_model": "shipped",
        "base_sha256": "0" * 64,
        "code": "0.1.0",
        "config": {"rank": 8},
        "seed": seed or 0,
        "threads": 2,
        "learned": [LearnedExample(example_id="e", partition="cluster/topic/documents/0", offset=offset, tokens=3)],
        "marks": marks,
        "weights": ref(weights),
        "optimizer": ref(optimizer),
        "replay": ref(replay),
        "rank": 8,
    }
    return Manifest.model_validate({**values, **changes}), [weights, optimizer, replay]


def accept(_: Manifest) -> None:
    """A trial load that succeeds."""


def publish_next(registry: Registry, offset: int, adapter: str = ADAPTER, **changes: object):
    manifest, blobs = make(registry.head(adapter), offset, adapter, **changes)
    return registry.publish(manifest, blobs, accept)


def test_an_adapter_without_versions(store):
    registry = make_registry(store)
    assert registry.head(ADAPTER) is None
    assert registry.alias(ADAPTER) is None
    assert registry.converge(ADAPTER) is None
    assert list(registry.versions(ADAPTER)) == []
    assert list(registry.adapters()) == []
    assert list(registry.revocations(ADAPTER)) == []
    with pytest.raises(NotFoundError):
        registry.manifest(ADAPTER, "sha256:" + "0" * 64)


def test_publishing_moves_the_line_and_the_alias(make_store):
    registry = make_registry(make_store())
    published = [publish_next(registry, offset) for offset in range(1, 6)]
    other = make_registry(make_store())
    for reader in (registry, other):
        head = reader.head(ADAPTER)
        assert head == Head(5, published[-1].version, published[-1].manifest)
        state = reader.alias(ADAPTER)
        assert (state.generation, state.seq, state.version, state.kind) == (5, 5, head.version, "promoted")
        assert state.previous_version == published[-2].version
        line = [(seq + 1, each.version) for seq, each in enumerate(published)]
        assert list(reader.versions(ADAPTER, newest_first=False)) == line
        assert list(reader.versions(ADAPTER)) == line[::-1]
        assert list(reader.versions(ADAPTER, limit=2)) == line[:2:-1]
    assert [each.was_new for each in published] == [True] * 5
    assert state.published_at.tzinfo is not None


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 40])
def test_the_head_is_found_without_any_hint(make_store, length):
    store = make_store()
    registry = make_registry(store)
    for offset in range(1, length + 1):
        publish_next(registry, offset, outcome="refused")
    assert make_registry(make_store()).head(ADAPTER).seq == length
    assert registry.alias(ADAPTER) is None


def test_the_head_is_found_after_others_moved_it(make_store):
    reader, writer = make_registry(make_store()), make_registry(make_store())
    for offset in range(1, 12):
        publish_next(writer, offset)
        if offset in {1, 2, 6, 11}:
            assert reader.head(ADAPTER).seq == offset


def test_adapters_within_adapters_stay_apart(store):
    registry = make_registry(store)
    names = ["acme", "acme/support", "acme/000000000001", "acme/live", "acme/000000000001/x", "b"]
    for number, name in enumerate(names):
        for offset in range(1, number + 2):
            publish_next(registry, offset, name)
    assert list(registry.adapters()) == sorted(names)
    for number, name in enumerate(names):
        assert registry.head(name).seq == number + 1
        assert [seq for seq, _ in registry.versions(name)] == list(range(number + 1, 0, -1))
        assert registry.alias(name).generation == number + 1
        registry.revoke(name, registry.head(name).version, "test")
    for name in names:
        assert [each.adapter for each in registry.revocations(name)] == [name]


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/a", "A", "a/b/c/d/e", "a b", "x" * 201, "a\n"])
def test_names_that_are_none_are_refused(store, name):
    registry = make_registry(store)
    for call in (registry.head, registry.alias, registry.converge, lambda n: list(registry.revocations(n))):
        with pytest.raises(StoreError):
            call(name)
    with pytest.raises(StoreError):
        registry.alias(ADAPTER, name or "a/b")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", [0, 2])
def test_a_publish_cut_off_after_any_step_converges(make_store, step, before):
    for offset in range(1, before + 1):
        publish_next(make_registry(make_store()), offset)
    manifest, blobs = make(make_registry(make_store()).head(ADAPTER), before + 1)
    with pytest.raises(Cut):
        make_registry(make_store(), cut_at=step).publish(manifest, blobs, accept)
    for _ in range(2):
        registry = make_registry(make_store())
        again = registry.publish(manifest, blobs, accept)
        assert again.version == manifest.digest()
        assert registry.head(ADAPTER).version == again.version
        assert registry.alias(ADAPTER) == again.alias_state
        assert (again.alias_state.generation, again.alias_state.seq) == (before + 1, before + 1)


@pytest.mark.parametrize("step", STEPS)
def test_a_restart_that_trains_otherwise_converges_on_one_version(make_store, step):
    """A GPU may make other bits from the same update: what was claimed first stands."""
    first, first_blobs = make(None, 1, seed=11)
    other, other_blobs = make(None, 1, seed=12)
    assert (first.update_id, first.digest() == other.digest()) == (other.update_id, False)
    with pytest.raises(Cut):
        make_registry(make_store(), cut_at=step).publish(first, first_blobs, accept)
    registry = make_registry(make_store())
    again = registry.publish(other, other_blobs, accept)
    claimed = STEPS.index(step) >= STEPS.index("claim_update")
    assert again.manifest == (first if claimed else other)
    assert [version for _, version in registry.versions(ADAPTER)] == [again.version]
    assert registry.alias(ADAPTER).version == again.version
    assert registry.alias(ADAPTER).generation == 1


@pytest.mark.parametrize("step", ["claim_seq", "gate"])
def test_converge_finishes_what_was_cut_off(make_store, step):
    publish_next(make_registry(make_store()), 1)
    manifest, blobs = make(make_registry(make_store()).head(ADAPTER), 2)
    with pytest.raises(Cut):
        make_registry(make_store(), cut_at=step).publish(manifest, blobs, accept)
    registry = make_registry(make_store())
    assert registry.alias(ADAPTER).seq == 1
    publish_next(registry, 3, outcome="refused")
    assert registry.alias(ADAPTER).seq == 1
    assert registry.converge(ADAPTER).seq == 2
    state = registry.alias(ADAPTER)
    assert (state.version, state.generation) == (manifest.digest(), 2)
    assert registry.converge(ADAPTER) == state


def test_a_refused_version_is_on_the_line_but_not_served(store):
    registry = make_registry(store)
    first = publish_next(registry, 1)
    refused = publish_next(registry, 2, outcome="refused")
    assert refused.alias_state is None
    assert registry.head(ADAPTER).version == refused.version
    assert registry.alias(ADAPTER).version == first.version
    assert registry.converge(ADAPTER).version == first.version
    third = publish_next(registry, 3)
    assert registry.alias(ADAPTER).previous_version == first.version
    assert registry.alias(ADAPTER).generation == 2
    assert third.manifest.head == refused.version


def test_rollbacks_and_forgets_tell_subscribers_so(store):
    registry = make_registry(store)
    first, second = publish_next(registry, 1), publish_next(registry, 2)
    back = publish_next(registry, 3, kind="rollback", weights=first.manifest.weights, reason="worse")
    assert back.alias_state.kind == "rolled_back"
    assert back.alias_state.previous_version == second.version
    assert back.alias_state.reason == "worse"
    assert publish_next(registry, 4, kind="forget").alias_state.kind == "revoked"
    assert publish_next(registry, 5, kind="replayed").alias_state.kind == "promoted"
    live = registry.alias(ADAPTER)
    assert registry.retire(ADAPTER, "live", "late", first.version) == live, "it went on to another version"
    retired = registry.retire(ADAPTER, "live", "customer left", live.version)
    assert (retired.kind, retired.generation, retired.seq) == ("retired", 6, 5)
    assert registry.retire(ADAPTER, "live", "again", live.version) == retired
    assert publish_next(registry, 6).alias_state.generation == 7


def test_a_stale_learner_is_refused_and_never_moves_the_alias_back(make_store):
    stale, fresh = make_registry(make_store()), make_registry(make_store())
    publish_next(stale, 1)
    old_head = stale.head(ADAPTER)
    late, late_blobs = make(old_head, 2, seed=21)
    publish_next(fresh, 3)
    current = publish_next(fresh, 4)
    with pytest.raises(ConflictError) as refused:
        stale.publish(late, late_blobs, accept)
    assert "head" in refused.value.remedy
    with pytest.raises(ConflictError):
        stale.swap_alias(late, late.digest())
    assert stale.swap_alias(old_head.manifest, old_head.version) == current.alias_state
    assert fresh.alias(ADAPTER) == current.alias_state
    assert [seq for seq, _ in fresh.versions(ADAPTER)] == [3, 2, 1]


def test_a_learner_stopped_before_its_swap_does_not_undo_later_ones(make_store):
    manifest, blobs = make(None, 1)
    with pytest.raises(Cut):
        make_registry(make_store(), cut_at="gate").publish(manifest, blobs, accept)
    current = publish_next(make_registry(make_store()), 2)
    late = make_registry(make_store()).publish(manifest, blobs, accept)
    assert (late.version, late.was_new, late.alias_state) == (manifest.digest(), False, current.alias_state)


def test_an_update_whose_claim_can_never_be_published_is_free_again(make_store):
    """Claimed, then cut off, then another version took its seq; the retrained update has the same id."""
    store = make_store()
    publish_next(make_registry(store), 1)
    head = make_registry(store).head(ADAPTER)
    orphan, orphan_blobs = make(head, 3)
    with pytest.raises(Cut):
        make_registry(store, cut_at="claim_update").publish(orphan, orphan_blobs, accept)
    publish_next(make_registry(store), 2, outcome="unchanged")
    registry = make_registry(make_store())
    with pytest.raises(ConflictError):
        registry.publish(orphan, orphan_blobs, accept)
    moved = registry.head(ADAPTER)
    made, blobs = make(head, 3, seed=33)
    manifest = made.model_copy(update={"head": moved.version, "seq": 3})
    assert manifest.update_id == orphan.update_id
    done = registry.publish(manifest, blobs, accept)
    assert (done.version, done.was_new) == (manifest.digest(), True)
    assert registry.publish(manifest, blobs, accept).version == done.version


def test_gaps_and_forks_are_refused(store):
    registry = make_registry(store)
    publish_next(registry, 1)
    head = registry.head(ADAPTER)
    for wrong in (
        make(Head(2, head.version, head.manifest), 9),
        make(Head(1, "sha256:" + "0" * 64, head.manifest), 9),
        make(None, 9),
    ):
        with pytest.raises(ConflictError):
            registry.publish(*wrong, accept)
    assert registry.head(ADAPTER) == head


@pytest.mark.parametrize("same_bits", [True, False])
def test_publishers_of_one_update_converge_on_one_version(make_store, same_bits):
    registries = [make_registry(make_store()) for _ in range(6)]
    head = None
    for number in range(1, 6):
        made = [make(head, number, seed=None if same_bits else 100 * number + i) for i in range(6)]
        barrier = threading.Barrier(6)

        def publish(i: int, made=made, barrier=barrier) -> Publication:
            barrier.wait()
            return registries[i].publish(*made[i], accept)

        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(publish, range(6)))
        assert len({each.version for each in done}) == 1
        assert sum(each.was_new for each in done) == 1
        assert {each.alias_state.generation for each in done} == {number}
        head = registries[0].head(ADAPTER)
        assert (head.seq, head.version) == (number, done[0].version)
    assert registries[3].alias(ADAPTER).generation == 5


def test_publishers_of_different_updates_make_one_line(make_store):
    def work(i: int) -> int:
        registry = make_registry(make_store())
        refused = 0
        for number in range(4):
            while True:
                manifest, blobs = make(registry.head(ADAPTER), 100 * i + number + 1)
                try:
                    registry.publish(manifest, blobs, accept)
                    break
                except ConflictError:
                    refused += 1
        return refused

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    registry = make_registry(make_store())
    line = dict(registry.versions(ADAPTER))
    assert sorted(line) == list(range(1, 17))
    for seq, version in line.items():
        assert registry.manifest(ADAPTER, version).head == line.get(seq - 1)
    state = registry.alias(ADAPTER)
    assert (state.seq, state.version) == (16, line[16])
    assert state.generation <= 16


def test_verify_sees_the_manifest_after_its_blobs_and_can_stop_it(store):
    registry = make_registry(store)
    manifest, blobs = make(None, 1)

    def refuse(seen: Manifest) -> None:
        assert get_blob(store, seen.weights.digest) == blobs[0]
        raise IntegrityError("does not load")

    with pytest.raises(IntegrityError):
        registry.publish(manifest, blobs, refuse)
    assert registry.head(ADAPTER) is None
    assert not store.exists(manifest_key(ADAPTER, manifest.digest()))


def test_blobs_that_are_missing_or_of_another_size_or_format_are_refused(store):
    registry = make_registry(store)
    manifest, blobs = make(None, 1)
    with pytest.raises(NotFoundError):
        registry.publish(manifest, blobs[1:], accept)
    wrong_size = manifest.weights.model_copy(update={"size_bytes": 1})
    with pytest.raises(IntegrityError):
        registry.publish(manifest.model_copy(update={"weights": wrong_size}), blobs, accept)
    pickled = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07weights\x94."
    for field in ("weights", "optimizer"):
        bad = manifest.model_copy(update={field: ref(pickled)})
        with pytest.raises(IntegrityError) as refused:
            registry.publish(bad, [*blobs, pickled], accept)
        assert "safetensors" in str(refused.value)
    assert registry.head(ADAPTER) is None


def test_flipped_bytes_are_refused_wherever_they_are(make_store):
    store = make_store()
    rng = random.Random(3)
    publish_next(make_registry(store), 1)
    version, manifest = (head := make_registry(store).head(ADAPTER)).version, head.manifest
    following, blobs = make(head, 2)
    carried = following.model_copy(update={"weights": manifest.weights})
    uses = {
        manifest_key(ADAPTER, version): lambda: make_registry(store).head(ADAPTER),
        blob_key(manifest.weights.digest): lambda: make_registry(store).publish(carried, blobs[1:], accept),
    }
    for key, use in uses.items():
        good = store.get(key)
        etag = good.etag
        for _ in range(50):
            broken = bytearray(good.data)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            etag = store.compare_and_swap(key, bytes(broken), etag)
            with pytest.raises(IntegrityError):
                use()
        store.compare_and_swap(key, good.data, etag)
    assert make_registry(store).head(ADAPTER) == head


@pytest.mark.parametrize("junk", [b"", b"{}", b"[1]", b"null", b'{"version":"sha256:x"}', b"\xff" * 10])
def test_junk_records_are_refused(store, junk):
    registry = make_registry(store)
    publish_next(registry, 1)
    for key in (f"aliases/{ADAPTER}/live", f"versions/{ADAPTER}/000000000001"):
        store.compare_and_swap(key, junk, store.get(key).etag)
    for call in (registry.alias, registry.head):
        with pytest.raises(IntegrityError):
            call(ADAPTER)


def test_another_adapters_objects_in_the_wrong_place_are_refused(store):
    registry = make_registry(store)
    publish_next(registry, 1, "acme")
    publish_next(registry, 1, "other")
    version = registry.head("acme").version
    moved = store.get(manifest_key("acme", version)).data
    store.put_if_absent(manifest_key("other", version), moved)
    with pytest.raises(IntegrityError):
        registry.manifest("other", version)
    key = "aliases/other/live"
    store.compare_and_swap(key, store.get("aliases/acme/live").data, store.get(key).etag)
    with pytest.raises(IntegrityError):
        registry.alias("other")


def test_revocations_are_kept_and_stop_a_late_swap(make_store):
    registry = make_registry(make_store())
    first = publish_next(registry, 1)
    manifest, blobs = make(registry.head(ADAPTER), 2)
    with pytest.raises(Cut):
        make_registry(make_store(), cut_at="gate").publish(manifest, blobs, accept)
    revoked = registry.revoke(ADAPTER, manifest.digest(), "erasure request")
    assert registry.revoke(ADAPTER, manifest.digest(), "second reason") == revoked
    assert list(make_registry(make_store()).revocations(ADAPTER)) == [revoked]
    assert (revoked.seq, revoked.reason) == (2, "erasure request")
    assert registry.publish(manifest, blobs, accept).alias_state == first.alias_state
    assert registry.converge(ADAPTER).version == first.version
    with pytest.raises(NotFoundError):
        registry.revoke(ADAPTER, "sha256:" + "0" * 64, "none")


def test_an_unpublished_manifest_cannot_be_revoked(store):
    manifest, blobs = make(None, 1)
    with pytest.raises(Cut):
        make_registry(store, cut_at="manifest").publish(manifest, blobs, accept)
    with pytest.raises(NotFoundError):
        make_registry(store).revoke(ADAPTER, manifest.digest(), "never was one")


def test_aliases_are_apart(store):
    registry = make_registry(store)
    manifest, blobs = make(None, 1)
    registry.publish(manifest, blobs, accept, alias="canary")
    assert registry.alias(ADAPTER) is None
    assert registry.alias(ADAPTER, "canary").version == manifest.digest()
    assert registry.converge(ADAPTER, "live").version == manifest.digest()


def test_erased_blobs_are_gone_and_the_line_is_not(store):
    registry = make_registry(store)
    batch = b'{"text": "a secret"}'
    manifest, blobs = make(None, 1, batch=ref(batch))
    registry.publish(manifest, [*blobs, batch], accept)
    assert store.delete(blob_key(digest_of(batch)))
    with pytest.raises(NotFoundError):
        get_blob(store, digest_of(batch))
    assert registry.head(ADAPTER).version == manifest.digest()
    put_blob(store, batch)
    assert get_blob(store, digest_of(batch)) == batch


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.failpoints import failpoint
from perennial.storage.registry.registry import Registry
from tests.contract.storage.test_registry import accept, make, make_registry
store = DirectoryStore(Path(sys.argv[2]))
registry = make_registry(store)
registry._failpoint = failpoint
registry.publish(*make(registry.head("acme/support"), 2), accept)
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_process_leaves_what_its_successor_finishes(tmp_path, step):
    root = str(Path(__file__).parents[3])
    publish_next(make_registry(DirectoryStore(tmp_path)), 1)
    made = make(make_registry(DirectoryStore(tmp_path)).head(ADAPTER), 2)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, root, str(tmp_path)], cwd=root, check=False,
        env={**os.environ, "PERENNIAL_FAILPOINT": f"publish.{step}:1"},
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL
    registry = make_registry(DirectoryStore(tmp_path))
    registry.publish(*made, accept)
    assert [seq for seq, _ in registry.versions(ADAPTER)] == [2, 1]
    assert registry.alias(ADAPTER).generation == 2
    assert registry.alias(ADAPTER).version == registry.head(ADAPTER).version
    assert not list((tmp_path / ".tmp").iterdir())


def test_a_recorded_manifest_takes_no_place_on_the_line(store):
    registry = make_registry(store)
    manifest, blobs = make(None, 1)
    published = registry.publish(manifest, blobs, lambda _: None)
    beside, _ = make(None, 2, kind="replayed")
    version = registry.record(beside)
    assert registry.record(beside) == version == beside.digest()
    assert registry.manifest(ADAPTER, version) == beside
    assert [found for _, found in registry.versions(ADAPTER)] == [published.version]
    with pytest.raises(ConflictError):
        registry.swap_alias(beside, version)


def test_every_alias_of_an_adapter_is_listed_and_no_other_adapters(store):
    registry = make_registry(store)
    for adapter, alias in ((ADAPTER, "live"), (ADAPTER, "canary"), ("acme", "live"), (f"{ADAPTER}/deep", "live")):
        manifest, blobs = make(None, 1, adapter=adapter) if registry.head(adapter) is None else (None, [])
        if manifest is not None:
            registry.publish(manifest, blobs, lambda _: None, alias)
        else:
            head = registry.head(adapter)
            registry.swap_alias(head.manifest, head.version, alias)
    assert [(state.adapter, state.alias) for state in registry.aliases(ADAPTER)] == [
        (ADAPTER, "canary"), (ADAPTER, "live"),
    ]  # fmt: skip
    assert list(registry.aliases("nobody")) == []


@pytest.mark.parametrize("kind", ["revoke", "quarantine", "forget"])
def test_a_version_that_replaces_a_revoked_one_says_so(store, kind):
    registry = make_registry(store)
    manifest, blobs = make(None, 1)
    registry.publish(manifest, blobs, lambda _: None)
    after, blobs = make(registry.head(ADAPTER), 2, kind=kind)
    assert registry.publish(after, blobs, lambda _: None).alias_state.kind == "revoked"
