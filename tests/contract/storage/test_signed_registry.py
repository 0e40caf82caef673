"""A registry with keys, on every store: it signs what it writes, and reads nothing that no trusted key signed."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from uuid import uuid4

import orjson
import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.keys import digest_of
from perennial.storage.registry.manifest import BlobRef
from perennial.storage.registry.records import Claim, alias_key, manifest_key, version_key
from perennial.storage.registry.registry import Registry
from perennial.storage.signing.key_files import make_signing_key, write_public_keys
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from perennial.storage.signing.version_statements import VersionSignatures, signature_key
from perennial.streams.client.testing import next_manifest, small_weights
from tests.keys import Keys

ADAPTER = "acme/support"
_serial = itertools.count(100)


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys")


def registry(store, trust):
    return Registry(store, nonce=lambda: uuid4().hex, now=lambda: datetime.now(UTC), trust=trust)


def publish(store, trust, adapter=ADAPTER, **changes):
    writer = registry(store, trust)
    weights = small_weights(next(_serial))
    manifest = next_manifest(writer, adapter, weights).model_copy(update=changes)
    return writer.publish(manifest, [weights], lambda _: None)


def put(store, key, data):
    """What an attacker does who can write to the bucket."""
    store.delete(key)
    assert store.put_if_absent(key, data)


def test_versions_and_aliases_are_signed_and_read_back(make_store, keys):
    publish(make_store(), keys.owner)
    done = publish(make_store(), keys.owner)
    for trust in (keys.owner, keys.readers, Trust()):
        reader = registry(make_store(), trust)
        assert reader.head(ADAPTER).version == done.version
        assert reader.alias(ADAPTER).version == done.version
        assert reader.alias(ADAPTER).generation == 2
    envelope = orjson.loads(make_store().get(signature_key(ADAPTER, done.version)).data)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert [each["keyid"] for each in envelope["signatures"]] == [keys.key_id]


def test_a_signed_alias_of_a_later_release_with_a_further_field_is_read(make_store, keys):
    publish(make_store(), keys.owner)
    later = registry(make_store(), keys.owner).alias(ADAPTER).model_copy(update={"later": "x"}).signed(keys.owner)
    assert b'"later":"x"' in later.to_bytes()
    put(make_store(), alias_key(ADAPTER, "live"), later.to_bytes())
    assert registry(make_store(), keys.readers).alias(ADAPTER).generation == 1
    put(make_store(), alias_key(ADAPTER, "live"), later.to_bytes().replace(b'"later":"x"', b'"later":"y"'))
    with pytest.raises(SignatureError):
        registry(make_store(), keys.readers).alias(ADAPTER)


def test_without_keys_the_bytes_of_an_alias_are_those_of_a_release_without_signatures(store):
    publish(store, None)
    assert "signature" not in orjson.loads(store.get(alias_key(ADAPTER, "live")).data)
    assert list(store.list("signatures/")) == []


def test_an_unsigned_version_and_an_unsigned_alias_are_refused(store, keys):
    done = publish(store, None)
    reader = registry(store, keys.readers)
    for read in (
        lambda: reader.head(ADAPTER),
        lambda: reader.manifest(ADAPTER, done.version),
        lambda: reader.alias(ADAPTER),
    ):
        with pytest.raises(SignatureError) as raised:
            read()
        assert raised.value.reason == "unsigned"
        assert "perennial keys sign" in raised.value.remedy


def test_a_learner_does_not_train_on_or_sign_what_a_stranger_put_on_the_line(store, keys):
    """Whoever can write to the bucket claims the next number for a version of their own."""
    honest = publish(store, keys.owner)
    forged = publish(store, keys.stranger)
    put(store, alias_key(ADAPTER, "live"), honest.alias_state.to_bytes())
    learner = registry(store, keys.owner)
    for act in (lambda: learner.head(ADAPTER), lambda: learner.converge(ADAPTER), lambda: publish(store, keys.owner)):
        with pytest.raises(SignatureError) as raised:
            act()
        assert raised.value.reason == "unknown-key"
    assert registry(store, Trust()).alias(ADAPTER).version == honest.version != forged.version


def test_a_changed_alias_is_refused_whichever_field_was_changed(store, keys):
    first, second = publish(store, keys.owner), publish(store, keys.owner)
    state = second.alias_state
    for change in (
        {"version": first.version}, {"generation": 99}, {"seq": 1}, {"kind": "retired"}, {"reason": "x"},
        {"previous_version": None}, {"nonce": "n"}, {"published_at": datetime(2030, 1, 1, tzinfo=UTC)},
    ):  # fmt: skip
        put(store, alias_key(ADAPTER, "live"), state.model_copy(update=change).to_bytes())
        with pytest.raises(SignatureError) as raised:
            registry(store, keys.readers).alias(ADAPTER)
        assert raised.value.reason == "forged", change
    put(store, alias_key(ADAPTER, "live"), state.to_bytes())
    assert registry(store, keys.readers).alias(ADAPTER).version == second.version


def test_the_signature_of_another_version_vouches_for_nothing(store, keys):
    honest = publish(store, keys.owner)
    forged = publish(store, None)
    put(store, signature_key(ADAPTER, forged.version), store.get(signature_key(ADAPTER, honest.version)).data)
    with pytest.raises(SignatureError, match="another version's"):
        registry(store, keys.readers).manifest(ADAPTER, forged.version)
    elsewhere = publish(store, keys.owner, "acme/other")
    other = signature_key("acme/other", elsewhere.version)
    put(store, other, store.get(signature_key(ADAPTER, honest.version)).data)
    with pytest.raises(SignatureError, match="another version's"):
        registry(store, keys.readers).manifest("acme/other", elsewhere.version)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"payloadType":"application/vnd.in-toto+json","payload":"!","signatures":[]}']
)
def test_a_damaged_envelope_is_refused_and_replaced_where_the_owner_signs_again(store, keys, data):
    done = publish(store, keys.owner)
    put(store, signature_key(ADAPTER, done.version), data)
    with pytest.raises(SignatureError) as raised:
        registry(store, keys.readers).manifest(ADAPTER, done.version)
    assert raised.value.reason == "forged"
    assert VersionSignatures(store, keys.owner).sign(ADAPTER, done.version, done.manifest.weights.digest)
    assert registry(store, keys.readers).manifest(ADAPTER, done.version) == done.manifest


def test_what_stands_there_before_a_version_is_published_does_not_keep_its_signature_away(store, keys):
    writer, weights = registry(store, keys.owner), small_weights(next(_serial))
    manifest = next_manifest(writer, ADAPTER, weights)
    put(store, signature_key(ADAPTER, manifest.digest()), b"garbage")
    writer.publish(manifest, [weights], lambda _: None)
    assert registry(store, keys.readers).head(ADAPTER).version == manifest.digest()


def test_a_line_that_names_an_older_signed_version_at_its_end_is_refused(store, keys):
    first, second = publish(store, keys.owner), publish(store, keys.owner)
    put(store, version_key(ADAPTER, 2), Claim(version=first.version).to_bytes())
    with pytest.raises(IntegrityError, match="another place"):
        registry(store, keys.owner).head(ADAPTER)
    assert second.manifest.seq == 2


def test_a_version_is_revoked_whoever_signed_it(store, keys):
    done = publish(store, keys.stranger)
    owner = registry(store, keys.owner)
    owner.revoke(ADAPTER, done.version, "nobody knows who made it")
    assert owner.is_revoked(ADAPTER, 1)


def test_both_keys_sign_during_a_rotation_and_the_old_one_can_be_taken_away(store, keys):
    done = publish(store, keys.owner)
    new = make_signing_key()
    write_public_keys(keys.public, {**keys.readers.trusted.by_id(), new.public.key_id: new.public})
    later = Trust(new, keys.owner.trusted)
    reader = registry(store, keys.readers)
    assert VersionSignatures(store, later).sign(ADAPTER, done.version, done.manifest.weights.digest)
    assert not VersionSignatures(store, later).sign(ADAPTER, done.version, done.manifest.weights.digest)
    second = publish(store, later)
    assert reader.head(ADAPTER).version == second.version
    write_public_keys(keys.public, {new.public.key_id: new.public})
    fresh = registry(store, keys.readers)
    assert [fresh.manifest(ADAPTER, each.version) for each in (done, second)] == [done.manifest, second.manifest]


def test_a_manifest_that_was_changed_is_another_version(store, keys):
    done = publish(store, keys.owner)
    other = done.manifest.model_copy(update={"weights": BlobRef(digest=digest_of(b"x"), size_bytes=1)})
    put(store, manifest_key(ADAPTER, done.version), other.to_bytes())
    with pytest.raises(IntegrityError):
        registry(store, keys.readers).manifest(ADAPTER, done.version)


def test_an_alias_that_a_process_without_a_key_changes_has_no_signature(store, keys):
    changed = publish(store, keys.owner).alias_state.model_copy(update={"generation": 9})
    assert changed.signed(Trust()).signature is None
    assert changed.signed(keys.owner).signature not in {None, changed.signature}
