"""Which manifests name the two parts of a composed version."""

from __future__ import annotations

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.streams.client.personal.served_parts import naming_parts, parts_of
from perennial.streams.client.testing import next_manifest

OWN, SHARED = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def personal(folder, extends):
    made = next_manifest(Registry(DirectoryStore(folder)), "acme/support/user", b"weights")
    return made.model_copy(update={"extends": extends})


def test_a_personal_version_that_names_two_digests_is_composed(tmp_path):
    assert parts_of(naming_parts(personal(tmp_path, "acme/support"), OWN, SHARED)) == (OWN, SHARED)


def test_a_version_that_extends_nothing_is_not_composed(tmp_path):
    assert parts_of(naming_parts(personal(tmp_path, None), OWN, SHARED)) is None


@pytest.mark.parametrize(
    "odd", ["", "x", "1" * 64, SHARED[:-1], SHARED + "\n", SHARED.replace("2", "G"), 2, True, None]
)
def test_parts_that_are_no_digests_are_not_taken(tmp_path, odd):
    manifest = personal(tmp_path, "acme/support")
    for config in ({"own_version": OWN, "shared_version": odd}, {"own_version": odd, "shared_version": SHARED}):
        assert parts_of(manifest.model_copy(update={"config": {**manifest.config, **config}})) is None
