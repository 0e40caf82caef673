"""The figures of the learning benchmark against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.learning import figures, report
from tests.benchmarks.learning.results import Results, RunKey
from tests.benchmarks.learning.retrieval import after_context, nearest
from tests.benchmarks.learning.runs import Budget

START = [5.0, 6.0, 7.0]
R = [
    [4.0, 5.9, 7.0],  # after the first block
    [4.5, 4.0, 6.8],
    [4.4, 4.4, 5.0],
]


def test_average_loss_is_the_mean_of_the_last_row():
    assert figures.average_loss(R) == pytest.approx((4.4 + 4.4 + 5.0) / 3)


def test_backward_transfer_is_negative_where_later_blocks_raised_the_loss():
    transfer = figures.backward_transfer(R)
    assert transfer == pytest.approx(-0.4)  # (4.0 - 4.4 + 4.0 - 4.4) / 2
    assert figures.gain_of_blocks(R, START) == pytest.approx(1.5)  # (1.0 + 2.0) / 2
    assert figures.backward_transfer_pct(transfer, 1.5) == pytest.approx(-100 * 0.4 / 1.5)


def test_backward_transfer_of_one_block_is_zero():
    assert figures.backward_transfer([[4.0]]) == 0
    assert figures.backward_transfer_pct(0.0, figures.gain_of_blocks([[4.0]], [5.0])) == 0


def test_forgetting_counts_from_the_best_since_the_own_block():
    r = [[4.0, 6.0, 7.0], [3.8, 4.0, 7.0], [4.4, 4.1, 5.0]]
    assert figures.forgetting(r) == pytest.approx(((4.4 - 3.8) + (4.1 - 4.0)) / 2)


def test_forward_transfer_is_what_earlier_blocks_did_for_a_domain():
    assert figures.forward_transfer(R, START) == pytest.approx(((6.0 - 5.9) + (7.0 - 6.8)) / 2)


def test_operations_are_summed_and_shared_among_the_trained_tokens():
    updates = [{"training_flops": 3e12, "measuring_flops": 5e11}, {"training_flops": 1e12, "measuring_flops": 0.0}]
    spent = figures.tflops(updates)
    assert spent == {"training_tflops": pytest.approx(4.0), "measuring_tflops": pytest.approx(0.5)}
    assert figures.gflops_per_1000_tokens(sum(spent.values()), 9_000) == pytest.approx(500)


def test_general_recovery_is_zero_as_sequential_and_one_as_joint():
    assert figures.general_recovery(4.4, sequential=4.4, joint=4.0) == 0
    assert figures.general_recovery(4.0, sequential=4.4, joint=4.0) == pytest.approx(1)
    assert figures.general_recovery(4.1, sequential=4.4, joint=4.0) == pytest.approx(0.75)


def test_worst_dip_sees_a_rise_between_two_measurements():
    updates = [{"a": 5.0, "b": 6.0}, {"a": 4.0, "b": 6.0}, {"a": 4.7, "b": 5.0}, {"a": 4.1, "b": 4.5}]
    assert figures.worst_dip(["a", "b"], updates, ["a", "a", "b", "b"]) == pytest.approx(0.7)


def test_prequential_loss_is_per_token():
    updates = [{"before": 20.0, "text_tokens": 5}, {"before": 10.0, "text_tokens": 5}]
    assert figures.prequential_loss(updates) == pytest.approx(3.0)


def test_loss_matrix_weighs_texts_by_their_tokens():
    record = {"domains": ["a"], "stages": [{"held_out": {"a": [[10.0, 10], [60.0, 20]]}}]}
    assert figures.loss_matrix(record) == [[pytest.approx(70 / 30)]]


def test_a_bootstrap_of_equal_differences_has_no_width():
    assert figures.paired_bootstrap([[[0.5, 0.5], [0.5]], [[0.5], [0.5]]]) == pytest.approx((0.5, 0.5, 0.5))


def test_a_bootstrap_weighs_domains_alike_and_holds_its_mean():
    mean, low, high = figures.paired_bootstrap([[[1.0, 1.0, 1.0, 1.0], [0.0]], [[1.0], [0.2]]])
    assert mean == pytest.approx((0.5 + 0.6) / 2)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.6)


def test_a_bootstrap_covers_the_mean_at_about_its_level():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        runs = (torch.randn(6, 3, 12, generator=generator) + 0.3).tolist()
        _, low, high = figures.paired_bootstrap(runs, resamples=400)
        covered += low <= 0.3 <= high
    assert covered >= 48


def test_differences_pair_documents_whatever_the_order_of_the_domains():
    one = {"domains": ["a", "b"], "stages": [{"held_out": {"a": [[4.0, 2]], "b": [[9.0, 3]]}, "general": [[2.0, 1]]}]}
    other = {"domains": ["b", "a"], "stages": [{"held_out": {"b": [[6.0, 3]], "a": [[2.0, 2]]}, "general": [[1.0, 1]]}]}
    assert figures.differences(one, other) == [[1.0], [1.0]]
    assert figures.general_differences(one, other) == [[1.0]]


def test_the_nearest_document_shares_the_rare_words():
    documents = ["return the graph and the nodes", "return the matrix inverse", "return the symbol"]
    assert nearest(["inverse of the matrix", "the nodes of a graph"], documents) == [1, 0]


def test_a_context_is_read_and_not_measured():
    from perennial.learner.model.tokenization import TokenRow

    row = after_context(TokenRow((0, 5, 6), 1), [7, 8, 9], room=5)
    assert row == TokenRow((0, 7, 8, 5, 6), 3)


def test_a_budget_follows_what_the_reference_had_spent():
    record = {"updates": [{"text_tokens": 100, "tokens": 400}, {"text_tokens": 300, "tokens": 600}]}
    budget = Budget.of_run(record)
    assert budget.total == 1000
    assert budget.at(0.25) == 400
    assert budget.at(1.0) == 1000
    assert budget.at(0.625) == pytest.approx(700)


def test_finished_runs_outlive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "runs.jsonl"
    key = RunKey("ours", "domains", 0, 1, "tiny", "abc")
    Results(path).add(key, {"stages": []})
    with path.open("a") as file:
        file.write('{"key": {"arm"')
    results = Results(path)
    assert results.find(key)["stages"] == []
    other = RunKey("replay", "domains", 0, 1, "tiny", "abc")
    results.add(other, {"stages": [1]})
    assert Results(path).find(other)["stages"] == [1]
    assert Results(path).find(RunKey("ours", "domains", 1, 1, "tiny", "abc")) is None


def test_a_stale_answer_is_one_whose_earlier_value_has_the_lower_loss():
    asked = [
        {"earlier": 2, "documents": [5.0, 6.0, 4.9, 1.0]},  # an earlier value is likelier
        {"earlier": 1, "documents": [5.0, 6.0, 4.0]},  # only another fact's value is likelier
        {"earlier": 1, "documents": [5.0, 6.0, 7.0]},
        {"earlier": 0, "documents": [5.0, 4.0]},  # no earlier value
    ]
    assert figures.stale_share(asked, "documents") == pytest.approx(1 / 3)
    assert figures.right_share(asked, "documents") == pytest.approx(1 / 4)
    assert figures.stale_share(asked[3:], "documents") is None
    assert figures.right_share([], "documents") is None


def test_stale_answers_are_compared_question_by_question():
    def record(*losses):
        return {"updates": [{"asked": [{"earlier": n, "documents": list(given)}]} for n, given in enumerate(losses)]}

    one = record([5.0, 4.0], [5.0, 4.0], [5.0, 6.0, 4.9])
    other = record([5.0, 4.0], [5.0, 6.0], [5.0, 6.0, 4.8])
    assert figures.stale_differences(one, other, "documents") == [[1.0, 0.0]], (
        "nothing is earlier in the first question"
    )
    records = {("ours", 0, 1): one, ("set", 0, 1): other, ("frozen", 0, 1): {"updates": []}}
    mean, low, high = report.compared_stale(records, "ours", "set")
    assert (mean, low, high) == (50.0, 0.0, 100.0)
    assert report.compared_stale(records, "frozen", "ours") is None
