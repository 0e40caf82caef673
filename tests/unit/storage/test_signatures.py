"""Keys, their files, and signatures of bytes."""

from __future__ import annotations

import os
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.storage.signing.key_files import (
    KeyFileError,
    TrustedKeys,
    make_signing_key,
    parse_public_keys,
    read_signing_key,
    write_public_keys,
    write_signing_key,
)
from perennial.storage.signing.signatures import SignatureError
from perennial.storage.signing.trust import Trust
from tests.keys import Keys

KIND = "application/vnd.perennial.alias.v1+json"


def test_a_private_key_is_written_for_its_owner_alone_and_read_back(tmp_path):
    key = make_signing_key()
    path = tmp_path / "new folder" / "signing.pem"
    write_signing_key(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_signing_key(path).public.key_id == key.public.key_id
    assert "PRIVATE" not in f"{key!r} {key}"
    with pytest.raises(KeyFileError, match="exists"):
        write_signing_key(path, make_signing_key())
    assert read_signing_key(path).public.key_id == key.public.key_id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_private_key_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "signing.pem"
    write_signing_key(path, make_signing_key())
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="others than its owner") as raised:
        read_signing_key(path)
    assert "chmod 600" in raised.value.remedy


@pytest.mark.parametrize("text", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_without_a_usable_private_key_is_refused_and_not_shown(tmp_path, text):
    path = tmp_path / "signing.pem"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="no private key that signs") as raised:
        read_signing_key(path)
    assert "AAAA" not in f"{raised.value} {raised.value.__cause__}"
    with pytest.raises(KeyFileError, match="cannot be used"):
        read_signing_key(tmp_path / "missing.pem")


def test_openssl_makes_and_reads_the_same_files(tmp_path):
    private = tmp_path / "openssl.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    private.chmod(0o600)
    key = read_signing_key(private)
    public = subprocess.run(["openssl", "pkey", "-in", private, "-pubout"], check=True, capture_output=True, text=True)
    assert list(parse_public_keys(public.stdout, "openssl")) == [key.public.key_id]
    der = subprocess.run(
        ["openssl", "pkey", "-in", private, "-pubout", "-outform", "DER"], check=True, capture_output=True
    )
    digest = subprocess.run(["openssl", "dgst", "-sha256", "-r"], check=True, capture_output=True, input=der.stdout)
    assert digest.stdout.split()[0].decode() == key.public.key_id.removeprefix("sha256:")


def test_trusted_keys_keep_their_labels_and_are_read_again_when_the_file_is_replaced(tmp_path):
    first, second = make_signing_key().public, make_signing_key().public
    path = tmp_path / "trusted.pem"
    write_public_keys(path, {first.key_id: first})
    trusted = TrustedKeys(path)
    assert list(trusted.by_id()) == [first.key_id]
    named = type(second)(second.key_id, second.raw, "next year")
    write_public_keys(path, {first.key_id: first, second.key_id: named})
    assert [key.label for key in trusted.by_id().values()] == ["", "next year"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_last_trusted_keys_stay_while_their_file_is_not_usable(tmp_path, caplog):
    first, second = make_signing_key().public, make_signing_key().public
    path = tmp_path / "trusted.pem"
    trusted = TrustedKeys(path)
    with pytest.raises(KeyFileError, match="cannot be used"):
        trusted.by_id()
    path.write_text("nothing")
    with pytest.raises(KeyFileError, match="no list of public keys"):
        trusted.by_id()
    write_public_keys(path, {first.key_id: first})
    assert list(trusted.by_id()) == [first.key_id]
    path.write_bytes(b"")  # as `cp` does first
    for _ in range(2):
        assert list(trusted.by_id()) == [first.key_id]
    assert len(caplog.records) == 1, "said once, although the file is read again at each use"
    assert "no list of public keys" in caplog.text
    path.write_text(second.pem())
    assert list(trusted.by_id()) == [second.key_id]
    path.unlink()
    assert list(trusted.by_id()) == [second.key_id]
    assert len(caplog.records) == 2
    with pytest.raises(KeyFileError, match="cannot be used"):
        TrustedKeys(path).by_id()


def test_a_private_key_in_the_file_of_trusted_keys_is_refused(tmp_path):
    keys = Keys(tmp_path)
    text = keys.public.read_text() + keys.private.read_text()
    with pytest.raises(KeyFileError, match="no list of public keys") as raised:
        parse_public_keys(text, "trusted.pem")
    assert keys.private.read_text().splitlines()[1] not in str(raised.value)


@given(st.binary(max_size=64), st.binary(min_size=1, max_size=64))
def test_a_signature_fits_one_kind_of_one_payload_by_one_key(payload, other):
    key = make_signing_key()
    signature = key.sign_bytes(KIND, payload)
    assert key.public.fits(KIND, payload, signature)
    assert key.sign_bytes(KIND, payload) == signature
    assert not key.public.fits(KIND, payload + other, signature)
    assert not key.public.fits(KIND + "x", payload, signature)
    assert not make_signing_key().public.fits(KIND, payload, signature)


def test_what_is_not_signed_by_a_trusted_key_is_refused_with_its_reason(tmp_path):
    keys = Keys(tmp_path)
    good = keys.owner.sign(KIND, b"payload")
    key_id, _, encoded = good.rpartition(":")
    changed = f"{key_id}:{'B' if encoded[0] == 'A' else 'A'}{encoded[1:]}"
    keys.readers.check(KIND, b"payload", good, "it")
    for signature, payload, reason in (
        (None, b"payload", "unsigned"),
        (keys.stranger.sign(KIND, b"payload"), b"payload", "unknown-key"),
        (good, b"another payload", "forged"),
        (changed, b"payload", "forged"),
        ("a name", b"payload", "forged"),
    ):
        with pytest.raises(SignatureError) as raised:
            keys.readers.check(KIND, payload, signature, "it")
        assert raised.value.reason == reason
        Trust().check(KIND, payload, signature, "it")


def test_the_umask_does_not_widen_a_private_key(tmp_path):
    before = os.umask(0)
    try:
        write_signing_key(tmp_path / "signing.pem", make_signing_key())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "signing.pem").stat().st_mode) == 0o600
