"""The oracle that the soak relies on: it must report a loss, a second learning and an erasure, each where it is one."""

from __future__ import annotations

from collections import Counter

from tests.oracle import DEAD_LETTERED, ERASED, LEARNED, PENDING, REFUSED, ROLLED_BACK, SKIPPED, AdapterRecord, classify

T = "documents/0"


def positions(*offsets: int):
    return {(T, offset) for offset in offsets}


def terms(contents, record: AdapterRecord, **more):
    fields = {"accepted": set(contents), "dead_letters": set(), **more}
    return {position[1]: found for position, found in classify(contents, [record], **fields).terms.items()}


def test_each_term_is_told_from_what_was_written():
    record = AdapterRecord(
        learned=Counter(positions(0)), in_updates=positions(0, 1, 2, 3, 4),
        skipped={(T, 1): "signal", (T, 2): "no-gain", (T, 3): "expired"},
    )  # fmt: skip
    contents = {(T, n): f"text {n}" for n in range(7)}
    found = terms(contents, record, dead_letters=positions(5), uncommitted=positions(0, 6))
    assert found == {
        0: [LEARNED],
        1: [SKIPPED],
        2: [REFUSED],
        3: [ERASED],
        4: [ERASED],
        5: [DEAD_LETTERED],
        6: [PENDING],
    }


def test_what_nothing_accounts_for_is_lost_and_what_two_account_for_is_counted_twice():
    contents = {(T, n): f"text {n}" for n in range(3)}
    record = AdapterRecord(learned=Counter(positions(1, 2)), in_updates=positions(1, 2))
    found = classify(contents, [record], accepted=positions(0, 1, 2), dead_letters=positions(2))
    assert found.wrong(contents) == {(T, 0): [], (T, 2): [LEARNED, DEAD_LETTERED]}
    assert found.count(contents)[LEARNED] == 1
    assert found.wrong([(T, 9)]) == {(T, 9): []}, "an acknowledged record that its topic does not have"


def test_a_duplicate_is_believed_only_behind_the_same_content_on_its_partition():
    contents = {(T, 0): "a", (T, 1): "b", (T, 2): "a", ("documents/1", 3): "a"}
    record = AdapterRecord(learned=Counter(positions(0)), in_updates=positions(0))
    found = classify(contents, [record], accepted=positions(0), dead_letters=())
    assert found.wrong(contents) == {(T, 1): [], ("documents/1", 3): []}
    assert found.terms[T, 2] == [SKIPPED]
    passed_on = classify(contents, [record], accepted=positions(0, 2), dead_letters=())
    assert (T, 2) in passed_on.wrong(contents), "it was passed on, so it must be somewhere"


def test_learning_twice_is_seen_by_position_and_by_example():
    record = AdapterRecord(
        first_learned=Counter({(T, 0): 2, (T, 1): 1}), learned=Counter({(T, 1): 1}),
        examples={"e": [(T, 0), (T, 1)], "f": [(T, 1)]},
    )  # fmt: skip
    assert record.learned_twice() == [f"{T}@0", "example e"]
    again = {(T, 0): (10, False), (T, 1): (20, True)}
    assert record.learned_twice(again) == [f"{T}@0"], "published again to be learned again"
    repeated = {(T, 0): (20, False), (T, 1): (10, True)}
    assert record.learned_twice(repeated) == [f"{T}@0", "example e"], "a repeat of what had been published again"


def test_a_document_that_goes_back_to_an_earlier_text_is_no_duplicate():
    contents = {(T, 0): "a", (T, 1): "b", (T, 2): "a", (T, 3): "a"}
    record = AdapterRecord(learned=Counter(positions(0, 1)), in_updates=positions(0, 1))
    found = classify(contents, [record], positions(0, 1), (), documents=dict.fromkeys(contents, "doc"))
    assert found.wrong(contents) == {(T, 2): []}, "lost: the model keeps b"
    assert found.terms[T, 3] == [SKIPPED]


def test_what_a_rollback_undid_is_told_from_what_was_erased():
    record = AdapterRecord(
        learned=Counter(positions(0, 3)), in_updates=positions(0, 1, 2, 3), undone=positions(1, 3)
    )  # fmt: skip
    found = terms({(T, n): f"text {n}" for n in range(4)}, record)
    assert found == {0: [LEARNED], 1: [ROLLED_BACK], 2: [ERASED], 3: [LEARNED]}, "3 was brought back"
