"""The oracle that the soak believes: it must see a loss, a second learning and an erasure, each where it is one."""

from __future__ import annotations

from collections import Counter

from tests.oracle import ERASED, LEARNED, LETTER, PENDING, REFUSED, SKIPPED, Line, reckon

T = "documents/0"


def places(*offsets: int):
    return {(T, offset) for offset in offsets}


def terms(values, line: Line, **more):
    fields = {"accepted": set(values), "letters": set(), **more}
    return {place[1]: found for place, found in reckon(values, [line], **fields).terms.items()}


def test_each_term_is_told_from_what_was_written():
    line = Line(
        learned=Counter(places(0)), listed=places(0, 1, 2, 3, 4),
        skipped={(T, 1): "signal", (T, 2): "no-gain", (T, 3): "expired"},
    )  # fmt: skip
    values = {(T, n): f"text {n}" for n in range(7)}
    found = terms(values, line, letters=places(5), waiting=places(0, 6))
    assert found == {0: [LEARNED], 1: [SKIPPED], 2: [REFUSED], 3: [ERASED], 4: [ERASED], 5: [LETTER], 6: [PENDING]}


def test_what_nothing_tells_of_is_lost_and_what_two_tell_of_is_counted_twice():
    values = {(T, n): f"text {n}" for n in range(3)}
    line = Line(learned=Counter(places(1, 2)), listed=places(1, 2))
    reckoning = reckon(values, [line], accepted=places(0, 1, 2), letters=places(2))
    assert reckoning.wrong(values) == {(T, 0): [], (T, 2): [LEARNED, LETTER]}
    assert reckoning.count(values)[LEARNED] == 1
    assert reckoning.wrong([(T, 9)]) == {(T, 9): []}, "an acknowledged record that its topic does not have"


def test_a_repeat_is_believed_only_behind_the_same_content_on_its_partition():
    values = {(T, 0): "a", (T, 1): "b", (T, 2): "a", ("documents/1", 3): "a"}
    line = Line(learned=Counter(places(0)), listed=places(0))
    found = reckon(values, [line], accepted=places(0), letters=())
    assert found.wrong(values) == {(T, 1): [], ("documents/1", 3): []}
    assert found.terms[T, 2] == [SKIPPED]
    passed_on = reckon(values, [line], accepted=places(0, 2), letters=())
    assert (T, 2) in passed_on.wrong(values), "it was passed on, so it must be somewhere"


def test_learning_twice_is_seen_by_place_and_by_example():
    line = Line(made=Counter({(T, 0): 2, (T, 1): 1}), learned=Counter({(T, 1): 1}), examples=Counter({"e": 2, "f": 1}))
    assert line.twice == [f"{T}@0", "example e"]
