"""The stored replay index, and the schedule: steps mixed by shares, repeatable draws."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import sha256

import pytest

from perennial.learner.model.tokenization import TokenRow
from perennial.learner.training.replay_buffer import (
    MAX_EPOCH_STEPS,
    BatchComposition,
    ReplayEntry,
    build_schedule,
    drop_words,
    index_from_bytes,
    index_to_bytes,
    seeded_random,
)
from perennial.storage.errors import IntegrityError


def row(number: int) -> TokenRow:
    return TokenRow((0, number, 1))


def steps_of(new: int, index: int, seed: int = 0, missing: frozenset[int] = frozenset()) -> list[tuple[TokenRow, ...]]:
    entries = [ReplayEntry(f"{number:032x}", "b") for number in range(index)]
    schedule = build_schedule(
        [row(100 + number) for number in range(new)],
        entries,
        lambda entry: None if int(entry.example_id, 16) in missing else [row(10_000 + int(entry.example_id, 16))],
        lambda rng: row(90_000 + rng.randrange(9)),
        BatchComposition(steps=3, rows=10, replay_share=0.4, general_share=0.2),
        seeded_random("test", seed),
    )
    assert schedule.replayed + schedule.missing == 0 or index
    return list(schedule.steps)


def shares(steps: list[tuple[TokenRow, ...]]) -> list[tuple[int, int, int]]:
    def count(step: tuple[TokenRow, ...], low: int, high: int) -> int:
        return sum(low <= r.ids[1] < high for r in step)

    return [(count(step, 100, 10_000), count(step, 10_000, 90_000), count(step, 90_000, 99_999)) for step in steps]


def test_a_step_follows_the_shares() -> None:
    assert shares(steps_of(new=12, index=50)) == [(4, 4, 2)] * 3


def test_every_new_row_is_trained_however_many_there_are() -> None:
    steps = steps_of(new=45, index=50)
    assert {r.ids[1] for step in steps for r in step if r.ids[1] < 10_000} == set(range(100, 145))
    assert len(steps) == 12


def test_every_new_row_is_trained_as_often_as_the_epochs_say() -> None:
    """A dozen facts in one update get the steps that it takes to learn them, not the few of one pass."""
    for new, epochs in ((36, 8), (5, 20), (1, 30)):
        composition = BatchComposition(steps=3, rows=12, replay_share=0.4, general_share=0.2, epochs=epochs)
        schedule = build_schedule(
            [row(number) for number in range(new)], (), lambda _: None, lambda _: row(90_000), composition,
            seeded_random("test", 0),
        )  # fmt: skip
        times = Counter(trained for step in schedule.steps for trained in step if trained != row(90_000))
        assert set(times) == {row(number) for number in range(new)}
        assert min(times.values()) >= epochs
        assert len(schedule.steps) <= -(-new * epochs // min(new, 10)) + 1


def test_further_passes_over_a_long_document_are_bounded() -> None:
    composition = BatchComposition(steps=3, rows=12, replay_share=0.4, general_share=0.2, epochs=50)
    for new in (1_000, 3_000):
        schedule = build_schedule(
            [row(number) for number in range(new)],
            (),
            lambda _: None,
            lambda _: None,
            composition,
            seeded_random("test", 0),
        )
        assert len(schedule.steps) == max(MAX_EPOCH_STEPS, new // 10)
        assert {trained for step in schedule.steps for trained in step} == {row(number) for number in range(new)}


def test_without_a_past_new_rows_take_the_place_of_replay() -> None:
    assert shares(steps_of(new=30, index=0))[0] == (8, 0, 2)


def test_a_small_batch_is_not_drowned_by_replay() -> None:
    assert shares(steps_of(new=1, index=50)) == [(1, 1, 1)] * 9


def question_row(number: int) -> TokenRow:
    """A frame of two tokens, eight words, a frame of one token, and an answer of three tokens."""
    return TokenRow((0, 1, *range(100, 108), 2, number, 3, 4), train_from=11, question=(2, 10))


def test_words_of_questions_are_left_out_and_nothing_else() -> None:
    kept: Counter[int] = Counter()
    for draw in range(400):
        row = drop_words(question_row(50), 0.25, seeded_random("drop", draw))
        start, end = row.question
        assert row.ids[:start] == (0, 1)
        assert row.ids[end:] == (2, 50, 3, 4)
        assert row.ids[row.train_from :] == (50, 3, 4)
        kept.update(row.ids[start:end])
    assert all(0.68 < kept[word] / 400 < 0.82 for word in range(100, 108))


def test_a_question_is_never_left_without_any_word() -> None:
    row = TokenRow((0, 100, 2, 3), train_from=3, question=(1, 2))
    assert {drop_words(row, 0.9, seeded_random("drop", draw)) for draw in range(50)} == {row}


def test_each_pass_leaves_out_other_words_and_general_rows_keep_theirs() -> None:
    composition = BatchComposition(
        steps=3, rows=12, replay_share=0.0, general_share=0.2, epochs=4, question_dropout=0.5
    )  # fmt: skip
    new = [question_row(number) for number in range(50, 80)]
    schedule = build_schedule(new, (), lambda _: None, lambda _: question_row(9), composition, seeded_random("drop", 0))
    rows = [row for step in schedule.steps for row in step]
    assert {row for row in rows if 9 in row.ids} == {question_row(9)}
    shown = {row.ids for row in rows if 50 in row.ids}
    assert len(shown) == 4, "other words in each of the four passes"
    untouched = build_schedule(
        new, (), lambda _: None, lambda _: question_row(9), replace(composition, question_dropout=0.0),
        seeded_random("drop", 0),
    )  # fmt: skip
    assert {row for step in untouched.steps for row in step} == {*new, question_row(9)}


def test_the_schedule_follows_from_its_seed() -> None:
    assert steps_of(new=12, index=50) == steps_of(new=12, index=50)
    assert steps_of(new=12, index=50) != steps_of(new=12, index=50, seed=1)


def test_the_draws_are_those_of_the_versions_recorded_so_far() -> None:
    """Forgetting repeats them: a change here means that no stored version can be rebuilt to the same bits."""
    drawn = [steps_of(new=new, index=index) for new, index in ((12, 50), (45, 3), (1, 50), (30, 0))]
    ids = [[[token_row.ids[1] for token_row in step] for step in steps] for steps in drawn]
    assert sha256(repr(ids).encode()).hexdigest()[:16] == "8765d1f104b19d49"


def test_erased_rows_are_left_out_and_counted() -> None:
    entries = [ReplayEntry(f"{number:032x}", "b") for number in range(8)]
    schedule = build_schedule(
        [row(100)], entries, lambda entry: None if entry.example_id.endswith("1") else [row(7)], lambda _: None,
        BatchComposition(steps=8, rows=2, replay_share=0.5, general_share=0.0), seeded_random(0),
    )  # fmt: skip
    assert schedule.missing == 1
    assert schedule.replayed == 7


@pytest.mark.parametrize("data", [b"", b"[1]", b'[{"batch": 1}]', b"{}", b"\xff"])
def test_a_damaged_replay_index_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        index_from_bytes(data)


def test_an_index_reads_back_and_entries_without_more_keep_their_bytes() -> None:
    """Forgetting compares the bytes of rebuilt indexes with those that earlier releases wrote."""
    plain = ReplayEntry("e1", "sha256:a")
    assert index_to_bytes([plain]) == b'[{"batch":"sha256:a","example_id":"e1"}]'
    described = ReplayEntry("e2", "sha256:a", "document", "place", 7)
    assert index_from_bytes(index_to_bytes([plain, described])) == (plain, described)
