"""`perennial economics`: the formulas against figures by hand, and what the command says of an adapter in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perennial.learner.costs.operations import WeightCounts
from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.history.update_costs import UpdateCost, costs_key, record_cost
from perennial.storage.registry.manifest import LearnedExample
from perennial.streams.cli.economics.cost_formulas import (
    DERIVED,
    RECORDED,
    YARDSTICKS,
    Assumptions,
    Cost,
    RetrainPlan,
    break_even,
    context_flops,
    serving_flops,
    total_cost,
    training_flops_per_token,
)
from perennial.streams.cli.economics.cost_report import EconomicsOptions, show_economics
from perennial.streams.cli.economics.recorded_updates import held_examples
from perennial.testing import small_weights
from tests import tiny
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
COUNTS = WeightCounts(frozen=1000, lora=100, head=500)
ASSUMED = Assumptions(usd_per_hour=3.6, usd_per_kwh=0.36, watts=100, request_tokens=256)


# ---- formulas


def test_a_trained_token_takes_the_products_that_a_frozen_base_needs():
    assert training_flops_per_token(COUNTS) == 4 * 1000 + 6 * 100 + 4 * 500
    assert context_flops(COUNTS, 7) == 2 * 1000 * 7
    assert serving_flops(COUNTS, 256) == 2 * 100 * 256


def test_money_follows_time_and_energy():
    cost = Cost(1, 1.0, seconds=10.0, seconds_from=RECORDED).with_energy(ASSUMED.watts)
    assert (cost.joules, cost.joules_from) == (1000.0, DERIVED)
    assert cost.rent_usd(ASSUMED) == pytest.approx(0.01)
    assert cost.electricity_usd(ASSUMED) == pytest.approx(0.36 / 3600)
    measured = Cost(1, 1.0, 10.0, RECORDED, joules=50.0, joules_from="rapl")
    assert measured.with_energy(ASSUMED.watts) is measured


def test_a_sum_knows_only_what_all_its_parts_know():
    one, two = Cost(1, 2.0, 3.0, RECORDED, 4.0, "rapl"), Cost(1, 2.0, 3.0, DERIVED, 4.0)
    assert total_cost([one, two]) == Cost(2, 4.0, 6.0, "derived and recorded", 8.0, "derived and rapl")
    assert total_cost([one, Cost(1, 1.0, None, DERIVED)]).seconds is None


@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (RetrainPlan(), 300),
        (RetrainPlan(epochs=3), 900),
        (RetrainPlan(general_share=0.25), 400),
        (RetrainPlan(least_rows=36), 3600),  # a small set is trained as often as an update's steps have rows
    ],
)
def test_a_retraining_passes_as_one_update_of_the_recipe_would(plan, tokens):
    assert plan.tokens([100, 50, 150]) == tokens
    assert plan.tokens([]) == 0


@pytest.mark.parametrize(
    ("cost", "saved", "requests"),
    [(10.0, 3.0, 4), (9.0, 3.0, 3), (10.0, 0.0, None), (10.0, -1.0, None), (None, 1.0, None)],
)
def test_break_even_is_the_first_request_at_which_it_pays(cost, saved, requests):
    assert break_even(cost, saved) == requests


def test_the_yardstick_has_the_weights_of_llama_8b():
    counts = YARDSTICKS["8b"].counts
    widths = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    assert counts.frozen == 32 * sum(a * b for a, b in widths)
    assert counts.lora == 32 * 16 * sum(a + b for a, b in widths)
    assert counts.head == 128_256 * 4096


# ---- the command


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    return DirectoryStore(tmp_path / "store", fsync=False)


def publish(
    store: DirectoryStore, *updates: tuple[int, int, dict[str, Any] | None], base_sha256: str | None = None
) -> VersionPublisher:
    """Publish one version per update: trained tokens, tokens of the one example that it learned, and its recorded cost."""
    publisher = VersionPublisher(store, ADAPTER, **({"base_sha256": base_sha256} if base_sha256 else {}))
    for number, (tokens, learned, cost) in enumerate(updates):
        weights = small_weights(number)
        example = LearnedExample(example_id=f"e{number}", partition="p", offset=number, tokens=learned)
        manifest = publisher.manifest(weights).model_copy(
            update={"tokens": tokens, "learned": [example], "config": {"alpha": 4, "epochs": 1, "general_share": 0.2}}
        )
        made = publisher.registry.publish(manifest, [weights], lambda _: None)
        if cost is not None:
            given: dict[str, Any] = {
                "training_flops": 3e9,
                "measuring_flops": 1e9,
                "seconds": 2.0,
                "device": "cpu",
                **cost,
            }
            record_cost(
                store, ADAPTER,
                UpdateCost(version=made.version, seq=number + 1, outcome="promoted", tokens=tokens, **given),
            )  # fmt: skip
    return publisher


def shown(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    assert show_economics(ADAPTER, EconomicsOptions(**{"measure": False, **options}), as_json=True) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_recorded_updates_are_shown_as_recorded(store, capsys):
    publish(store, (100, 50, {}), (200, 80, {"joules": 30.0, "energy_source": "rapl"}))
    facts = shown(capsys, usd_per_hour=3.6, watts=10.0)
    assert [(u["tokens"], u["flops"], u["measuring_flops"], u["seconds"]) for u in facts["updates"]] == [
        (100, 4e9, 1e9, 2.0), (200, 4e9, 1e9, 2.0)
    ]  # fmt: skip
    assert [(u["joules"], u["joules_from"]) for u in facts["updates"]] == [(20.0, "derived"), (30.0, "rapl")]
    assert facts["total"]["rent_usd"] == pytest.approx(4 * 3.6 / 3600)
    assert facts["total"]["joules_from"] == "derived and rapl"
    assert facts["examples"] == {"held": 2, "tokens": 130}


def test_what_is_not_recorded_is_derived_and_says_so(store, capsys):
    publish(store, (100, 50, None), (200, 80, {}))
    facts = shown(capsys)
    old, new = facts["updates"]
    counts = WeightCounts(facts["machine"]["frozen"], facts["machine"]["lora"], 0)
    assert old["flops"] == 100 * training_flops_per_token(counts)
    assert old["seconds"] == pytest.approx(old["flops"] / (4e9 / 2.0))
    assert (old["seconds_from"], new["seconds_from"]) == ("derived", "recorded")


def test_without_any_record_times_are_unknown_and_operations_are_not(store, capsys):
    publish(store, (100, 50, None))
    facts = shown(capsys, request_tokens=1)
    assert facts["total"]["seconds"] is None
    assert facts["total"]["rent_usd"] is None
    assert facts["break_even"]["updates_against_context_requests"]["by_seconds"] is None
    assert facts["break_even"]["updates_against_context_requests"]["by_flops"] > 0
    assert show_economics(ADAPTER, EconomicsOptions(measure=False), as_json=False) == 0
    assert "no number of requests by time" in capsys.readouterr().out


def test_break_even_and_retraining_follow_from_the_parts(store, capsys):
    publish(store, (100, 50, {}), (200, 80, {}))
    facts = shown(capsys, request_tokens=1)
    counts = WeightCounts(facts["machine"]["frozen"], facts["machine"]["lora"], 0)
    context = 2 * counts.frozen * 130
    assert facts["context_per_request"]["flops"] == context
    assert facts["break_even"]["updates_against_context_requests"]["by_flops"] == -(-8e9 // (context - 2 * counts.lora))
    retrained = -(-130 // 0.8)
    assert facts["retraining"]["tokens"] == pytest.approx(retrained, abs=1)
    assert facts["retraining_at_every_update"]["tokens"] == pytest.approx(retrained + 50 / 0.8, abs=2)
    assert shown(capsys, retrain_passes=10.0)["retraining"]["tokens"] == 1300
    assert shown(capsys, context_tokens=30)["context_per_request"]["tokens"] == 30


def test_on_a_larger_base_everything_follows_from_the_formulas(store, capsys):
    publish(store, (100, 50, {}), (200, 80, {}))
    facts = shown(capsys, on="8b")
    base = YARDSTICKS["8b"]
    flops = 300 * training_flops_per_token(base.counts)
    assert facts["total"]["flops"] == flops
    assert facts["total"]["seconds"] == pytest.approx(flops / base.flops_per_s)
    assert facts["total"]["seconds_from"] == "formula"
    assert facts["assumed"]["usd_per_hour"] == 3.0


def test_only_examples_of_the_newest_schedule_count(store):
    publisher = publish(store, (100, 50, None), (200, 80, None))
    first = publisher.registry.manifest(ADAPTER, next(publisher.registry.versions(ADAPTER, newest_first=False))[1])
    weights = small_weights(9)
    back = publisher.manifest(weights).model_copy(update={"kind": "rollback", "parent": first.digest(), "learned": []})
    publisher.registry.publish(back, [weights], lambda _: None)
    head = publisher.registry.head(ADAPTER)
    assert head is not None
    assert [[example.tokens for example in group] for group in held_examples(publisher.registry, head)] == [[50]]


def test_a_damaged_record_is_as_good_as_none(store, capsys):
    publish(store, (100, 50, None))
    store.compare_and_swap(costs_key(ADAPTER), b"{", None)
    assert shown(capsys)["updates"][0]["seconds_from"] == "derived"


def test_a_base_that_is_at_hand_is_measured(store, capsys, monkeypatch):
    base = tiny.base()
    publish(store, (100, 50, {}), base_sha256=base.digest)
    monkeypatch.setattr("perennial.learner.model.base.load_base", lambda *_: base)
    monkeypatch.setattr("perennial.streams.cli.economics.cost_report._MEASURE_S", 0.05)
    facts = shown(capsys, measure=True, request_tokens=8)
    assert facts["machine"]["head"] == base.model.get_output_embeddings().weight.numel()
    assert facts["machine"]["context_tokens"] == base.max_positions
    carried = min(50, base.max_positions - 8)
    expected = "measured here" if carried == 50 else f"measured here on {carried} tokens, in proportion"
    assert facts["context_per_request"]["seconds_from"] == expected
    assert facts["context_per_request"]["fits"] is (base.max_positions >= 50 + 8)


def test_another_base_is_not_measured_and_that_is_said(store, capsys, monkeypatch):
    publish(store, (100, 50, {}))
    monkeypatch.setattr("perennial.learner.model.base.load_base", lambda *_: tiny.base())
    assert show_economics(ADAPTER, EconomicsOptions(), as_json=True) == 0
    captured = capsys.readouterr()
    assert "the base is not measured: the base that is set is not the adapter's" in captured.err
    assert json.loads(captured.out)["machine"]["head_known"] is False


def test_the_tables_name_where_each_figure_is_from(store, capsys):
    publish(store, (100, 50, {}), (200, 80, None))
    assert show_economics(ADAPTER, EconomicsOptions(measure=False, limit=1), as_json=False) == 0
    out = capsys.readouterr().out
    assert "all 2" in out
    assert "output layer not counted" in out
    assert "derived and recorded" in out
    assert "one retraining costs as much as" in out


def test_an_unknown_adapter_is_not_found(store):
    with pytest.raises(NotFoundError):
        show_economics("acme/none", EconomicsOptions(), as_json=False)
