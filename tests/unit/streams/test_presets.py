"""Presets: the size of the base gives the defaults of what nobody set."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from perennial.streams.settings import Settings
from perennial.streams.settings.presets import parameters_of, preset_of, preset_settings, presets


def test_the_shipped_base_keeps_the_defaults_of_the_settings():
    assert dict(presets()[0].values) == {}
    given = Settings.of(env_file=None, base="shipped")
    for name, group in (("training", given.training), ("gate", given.gate), ("curate", given.curate)):
        for field, info in type(group).model_fields.items():
            assert getattr(group, field) == info.default, (name, field)


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_a_preset_is_of_valid_settings_and_names_its_source(preset):
    assert preset.source
    settings = Settings.of(env_file=None, **preset.values)
    assert (
        settings.environment().items() >= {f"PERENNIAL_{k.upper()}": str(v) for k, v in preset.values.items()}.items()
    )


def test_presets_are_sorted_and_the_last_takes_every_base():
    sizes = [preset.max_parameters for preset in presets()]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10**13


def test_what_a_user_sets_stays_and_the_rest_is_by_the_size(monkeypatch):
    small = preset_of("smollm2")
    assert small is not None
    monkeypatch.setenv("PERENNIAL_RANK", "4")
    settings = Settings.of(env_file=None, base="smollm2", alpha=5)
    assert (settings.training.rank, settings.training.alpha) == (4, 5)
    unset = {name: value for name, value in small.values.items() if name not in {"rank", "alpha"}}
    assert settings.environment().items() >= {f"PERENNIAL_{k.upper()}": str(v) for k, v in unset.items()}.items()


def test_another_base_brings_its_own_preset(monkeypatch):
    monkeypatch.delenv("PERENNIAL_RANK", raising=False)
    shipped = Settings.of(env_file=None, base="shipped", learning_rate=7e-4)
    there = shipped.replace(base="smollm2")
    assert there.training.rank == preset_of("smollm2").values["rank"]
    assert there.training.learning_rate == 7e-4
    assert there.replace(base="shipped") == shipped
    assert there.replace(rank=3).replace(base="shipped").training.rank == 3


def test_the_size_of_a_base_is_read_without_loading_it(tmp_path: Path):
    header = json.dumps({
        "__metadata__": {"a": "b"}, "w": {"dtype": "BF16", "shape": [1000, 200], "data_offsets": [0, 400_000]},
    }).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert parameters_of(str(tmp_path)) == 200_000
    (tmp_path / "a.gguf").write_bytes(bytes(5000))
    assert parameters_of(str(tmp_path / "a.gguf")) == 8000


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000), ("meta-llama/Llama-3.1-8B@main", 8_000_000_000),
     ("Qwen/Qwen2.5-0.5B-Instruct", 500_000_000), ("gpt2", None), ("acme/v2-Bert", None), ("", None)],
)  # fmt: skip
def test_a_hub_id_says_its_size_or_has_the_general_defaults(name, parameters):
    assert parameters_of(name) == parameters


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_folder_has_no_size(tmp_path: Path, data: bytes):
    (tmp_path / "model.safetensors").write_bytes(data)
    assert preset_of(str(tmp_path)) is None


def test_presets_set_only_what_is_a_setting():
    flat = {name.removeprefix("PERENNIAL_").lower() for name in Settings.of(env_file=None).environment()}
    assert preset_settings() <= flat
