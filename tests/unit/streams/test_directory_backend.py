"""The `adapter_config.json` that `DirectoryBackend` writes is one that servers of adapters take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perennial import DirectoryBackend
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.registry import Registry
from perennial.streams.client.testing import next_manifest
from perennial.testing import small_weights

NAME = f"acme/support@{'a' * 64}"


def written_base(tmp_path: Path, manifest_names: str, **options: str) -> str:
    registry = Registry(DirectoryStore(tmp_path / "store", fsync=False), nonce=str, now=None)
    manifest = next_manifest(registry, "acme/support", small_weights()).model_copy(
        update={"base_model": manifest_names}
    )
    DirectoryBackend(tmp_path / "served", **options).load(NAME, small_weights(), manifest)
    config = (tmp_path / "served/acme/support" / f"@{'a' * 64}" / "adapter_config.json").read_bytes()
    return json.loads(config)["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("manifest_names", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("HuggingFaceTB/SmolLM2-135M@1d461723ee", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2@main", "gpt2"),
        ("/models/my@model", "/models/my@model"),
        ("shipped", "shipped"),
    ],
)
def test_the_base_is_named_as_servers_name_it(tmp_path, manifest_names, expected):
    assert written_base(tmp_path, manifest_names) == expected


def test_the_name_of_the_base_can_be_given(tmp_path):
    assert written_base(tmp_path, "shipped", base_model_name="/models/base") == "/models/base"
