"""Runs of the learning benchmark on a tiny base: what they record, spend and keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perennial.learner.costs.operations import WeightCounts
from perennial.learner.model.lora import LoraConfig
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.settings import load_settings
from tests import tiny
from tests.benchmarks.learning import comparison, report
from tests.benchmarks.learning.arms import ARMS, Arm, changed, tuned_rate
from tests.benchmarks.learning.comparison import Comparison, Size
from tests.benchmarks.learning.generated import revision_stream, ticket_stream
from tests.benchmarks.learning.results import Results
from tests.benchmarks.learning.streams import domain_stream
from tests.benchmarks.learning.texts import is_held_out, package_texts
from tests.benchmarks.learning.world import World

SIZE = Size(batches=1, held_out=3, seeds=(0,), orders=(1,))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    general = tmp_path_factory.mktemp("general") / "texts.jsonl"
    general.write_text("".join(json.dumps({"text": f"plain words, number {n}, on nothing"}) + "\n" for n in range(80)))
    settings = load_settings(base="shipped", env_file=None, device="cpu", threads=1, general_texts=str(general))
    return World(tiny.base(), settings, runs=3, general=4)


@pytest.fixture(autouse=True)
def settings_of_the_shipped_base(monkeypatch):
    of = Arm.settings
    monkeypatch.setattr(Arm, "settings", lambda arm, _: of(arm, "shipped"))


def compare(world: World, path: Path, stream: str, names: list[str], lines: list[str]) -> Comparison:
    arms = [ARMS[name] if name in ARMS else changed(name) for name in names]
    return Comparison(world, Results(path), stream, arms, SIZE, 3, say=lines.append)


@pytest.mark.slow(20)
def test_every_arm_spends_what_ours_spends_and_no_run_is_done_twice(world, tmp_path):
    names = ["frozen", "ours", "sequential", "replay", "replay+ema", "replay+reptile", "steps=6"]
    lines: list[str] = []
    records = compare(world, tmp_path / "runs.jsonl", "templates", names, lines).run()
    spent = {arm: sum(u["tokens"] for u in record["updates"]) for (arm, _, _), record in records.items()}
    assert len(lines) == len(records) == len(names)
    for arm in ("sequential", "replay", "replay+ema", "replay+reptile"):
        assert spent[arm] == pytest.approx(spent["ours"], rel=0.1), arm
    assert spent["frozen"] == 0
    assert spent["ours steps=6"] > 1.3 * spent["ours"]
    found = report.means(records)
    assert found["replay"]["refused_pct"] == 0
    rank = ARMS["ours"].settings("shipped").training.rank
    counts = WeightCounts.of(world._slot(0, LoraConfig(rank, ARMS["ours"].settings("shipped").training.alpha)))
    for arm in ("sequential", "ours"):
        of_weights = 4 * (counts.frozen + counts.head) + 6 * counts.lora
        flops = 1e12 * found[arm]["training_tflops"]
        assert flops > 0.9 * spent[arm] * of_weights, "each trained token takes this, and what is only read takes more"
    assert all(found[arm]["measuring_tflops"] > 0 for arm in ("ours", "sequential"))
    assert found["frozen"]["training_tflops"] == found["frozen"]["measuring_tflops"] == 0
    assert "gflops_per_1000_tokens" not in found["frozen"]
    line = report.last_line({"templates": records}, {})
    assert line["operations"]["templates"]["replay"]["gflops_per_1000_tokens"] > 0
    assert sum(update["examples"] for update in records["ours", 0, 1]["updates"]) == 36
    assert len(report.intervals(records, list(found))) == len(names) - 1

    again = compare(world, tmp_path / "runs.jsonl", "templates", names, lines)
    assert again.run() == records
    assert len(lines) == len(names)


@pytest.mark.slow(20)
def test_joint_training_spends_the_same_and_cumulative_training_once_per_block(world, tmp_path, monkeypatch):
    monkeypatch.setitem(comparison.PACKAGES, "domains", ("networkx", "sympy"))
    records = compare(
        world, tmp_path / "runs.jsonl", "domains", ["frozen", "joint", "cumulative", "retrieval"], []
    ).run()
    spent = {arm: [u["tokens"] for u in record["updates"]] for (arm, _, _), record in records.items()}
    assert spent["joint"] == [pytest.approx(sum(spent["ours"]), rel=0.1)]
    assert spent["cumulative"] == pytest.approx([spent["ours"][0], sum(spent["ours"])], rel=0.15)
    assert [len(records[arm, 0, 1]["stages"]) for arm in ("joint", "cumulative", "retrieval")] == [1, 2, 1]
    assert len(report.plot(records, tmp_path)) == 2


@pytest.mark.slow(10)
def test_olora_has_a_lora_per_block_and_spends_what_ours_spends(world, tmp_path, monkeypatch):
    monkeypatch.setitem(comparison.PACKAGES, "domains", ("networkx", "sympy"))
    ranks: list[int] = []
    over_frozen = World.over_frozen

    def recorded(of, updater, weights):
        made = over_frozen(of, updater, weights)
        ranks.append(made.lora.config.rank)
        return made

    monkeypatch.setattr(World, "over_frozen", recorded)
    records = compare(world, tmp_path / "runs.jsonl", "domains", ["frozen", "olora"], []).run()
    rank = ARMS["olora"].settings("shipped").training.rank
    assert ranks == [2 * rank]
    spent = {arm: sum(u["tokens"] for u in record["updates"]) for (arm, _, _), record in records.items()}
    assert spent["olora"] == pytest.approx(spent["ours"], rel=0.1)
    updates = records["olora", 0, 1]["updates"]
    assert all(update["outcome"] == "promoted" and update["after"] < update["before"] for update in updates)


@pytest.mark.slow(10)
def test_revised_facts_are_asked_for_after_each_revision(world, tmp_path):
    records = compare(world, tmp_path / "runs.jsonl", "revisions", ["frozen", "joint"], []).run()
    assert {arm for arm, _, _ in records} == {"frozen", "ours"}  # a shuffled stream has no revisions
    asked = [found for update in records["ours", 0, 1]["updates"] for found in update["asked"]]
    assert [found["earlier"] for found in asked] == [n for n in range(5) for _ in range(24)]
    ours = report.means(records)["ours"]
    assert 0 <= ours["stale_pct"] <= 100
    rebuilt = [len(stage.get("asked_rebuilt", ())) for stage in records["ours", 0, 1]["stages"]]
    assert rebuilt == [0, 24, 24, 24, 24], "what the first block teaches supersedes nothing"
    assert 0 <= ours["stale_rebuilt_pct"] <= 100
    rebuilds = [stage.get("rebuild") for stage in records["ours", 0, 1]["stages"]]
    assert rebuilds[0] is None
    assert all(rebuild["training_flops"] > 0 and rebuild["tokens"] > 0 for rebuild in rebuilds[1:])
    assert (
        0
        < ours["rebuild_tflops"]
        == pytest.approx(sum(r["training_flops"] + r["measuring_flops"] for r in rebuilds[1:]) / 1e12)
    )
    line = report.last_line({"revisions": records}, {"base": "tiny"})
    assert line["stale_pct"] == pytest.approx(ours["stale_pct"], abs=1e-3)
    assert line["general_recovery"] is None


def test_a_run_that_is_not_begun_in_time_is_counted(world, tmp_path):
    comparison = compare(world, tmp_path / "runs.jsonl", "templates", ["frozen"], [])
    comparison.until_s = 0.0
    assert comparison.run() == {}
    assert comparison.unfinished == 2


def test_a_change_names_an_arm_and_keeps_the_rest():
    arm = changed("replay_share=0.3, reptile=0.8")
    assert arm.name == "ours replay_share=0.3, reptile=0.8"
    assert arm.reptile == 0.8
    assert arm.settings("shipped").training.replay_share == 0.3
    with pytest.raises(ValueError, match="name=value"):
        changed("replay_share")


def test_a_rate_that_nobody_chose_is_the_default(tmp_path):
    assert tuned_rate("shipped", "replay", tmp_path / "none.json") == 1e-3
    chosen = tmp_path / "rates.json"
    chosen.write_text('{"rates": {"shipped": {"replay": 0.004}}}')
    assert tuned_rate("shipped", "replay+ema", chosen) == 0.004
    assert tuned_rate("shipped", "joint", chosen) == tuned_rate("smollm2", "replay", chosen) == 1e-3


def test_no_gate_refuses_nothing():
    settings = load_settings(base="shipped", env_file=None)
    recipe = ARMS["replay"].recipe(settings, None)
    assert recipe.held_out_share == 0
    assert recipe.anchor_rows == 0
    assert ARMS["ours"].recipe(settings, None).max_general_rise_nats == settings.gate.max_general_rise_nats


def test_held_out_documents_come_from_files_that_are_never_trained():
    trained, held_out = (package_texts("networkx", held_out=part) for part in (False, True))
    assert len(held_out) > 100
    assert not set(trained) & set(held_out)
    assert is_held_out("networkx/a.py") is is_held_out("networkx/a.py")


def test_a_domain_stream_has_the_micro_batches_that_the_service_cuts():
    policy = CutPolicy.of(load_settings(base="shipped", env_file=None))

    def tokens_of(example):
        return len(example.text) // 4

    streams = [domain_stream("x", ("networkx", "sympy"), 0, order, tokens_of, policy, 3, 5) for order in (1, 2)]
    assert [stream.domains for stream in streams] == [("networkx", "sympy"), ("sympy", "networkx")]
    for stream in streams:
        assert {len(texts) for texts in stream.held_out.values()} == {5}
        for block in stream.blocks:
            total = sum(map(tokens_of, block.examples))
            assert 3 * policy.max_tokens <= total < 3 * policy.max_tokens + 3 * 1000
        offsets = [example.origin.offset for block in stream.blocks for example in block.examples]
        assert offsets == list(range(len(offsets)))
    first, second = ({e.example_id for b in stream.blocks for e in b.examples} for stream in streams)
    assert first == second


def test_tickets_share_one_template_and_none_is_learned_and_measured():
    stream = ticket_stream(1, 1)
    learned = [example.text for example in stream.blocks[0].examples]
    assert len(learned) == 36
    assert len(set(learned) | set(stream.held_out["tickets"])) == 48
    assert all(text.startswith("Order ") for text in learned)
    assert {e.example_id for e in ticket_stream(1, 2).blocks[0].examples} == {
        e.example_id for e in stream.blocks[0].examples
    }


def test_a_fact_never_has_one_value_twice_and_each_revision_replaces_the_last():
    stream = revision_stream(3, 1)
    ids = [example.example_id for block in stream.blocks for example in block.examples]
    assert len(set(ids)) == 5 * 24
    assert len(stream.replaces) == 4 * 24
    assert set(stream.replaces.values()) == set(ids[: 4 * 24])
    for question in stream.questions.values():
        assert len(set(question.documents)) == len(question.documents)
        assert len(question.answers) == len(question.documents) > question.earlier


def test_the_documentation_names_every_arm_and_every_figure_of_the_last_line():
    text = (Path(__file__).parents[3] / "docs" / "learning" / "README.md").read_text("utf-8")
    assert [name for name in ARMS if f"`{name}`" not in text] == []
    assert [name for name in report.last_line({}, {}) if name != "missed" and f"`{name}`" not in text] == []
