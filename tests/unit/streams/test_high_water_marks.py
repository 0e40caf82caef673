"""HighWaterMarks: positions compare by leader epoch first, and marks only rise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perennial.streams.events.high_water_marks import NO_MARKS, HighWaterMarks
from perennial.streams.events.models import Origin


def origin(partition: int, epoch: int, offset: int) -> Origin:
    return Origin(
        cluster_id="c", topic="documents", topic_id="t", partition=partition, leader_epoch=epoch, offset=offset,
        timestamp_ms=0,
    )  # fmt: skip


numbers = st.one_of(st.integers(0, 3), st.sampled_from([2**31 - 1, 2**63 - 1]))
origins = st.builds(origin, st.integers(0, 2), st.integers(0, 3), numbers)
marks = st.lists(origins, max_size=6).map(HighWaterMarks.of)


@given(marks, st.lists(origins, max_size=6), origins)
def test_covers_is_monotone(before: HighWaterMarks, more: list[Origin], record: Origin) -> None:
    after = before.raised(more)
    assert after.covers_all(before)
    assert after.covers(record) or not before.covers(record)
    assert all(after.covers(each) for each in more)
    assert after.raised(more) == after


@given(marks, marks, marks)
def test_merged_is_commutative_associative_and_idempotent(
    one: HighWaterMarks, other: HighWaterMarks, third: HighWaterMarks
) -> None:
    assert one.merged(other) == other.merged(one)
    assert one.merged(other).merged(third) == one.merged(other.merged(third))
    assert one.merged(one) == one.merged(NO_MARKS) == one
    assert one.covers_all(other) == (one.merged(other) == one)


@given(st.lists(origins, max_size=6), st.lists(origins, max_size=6))
def test_raising_is_merging(some: list[Origin], others: list[Origin]) -> None:
    assert HighWaterMarks.of(some).raised(others) == HighWaterMarks.of(some).merged(HighWaterMarks.of(others))
    assert HighWaterMarks.of(some + others) == HighWaterMarks.of(others + some)


@given(origins)
def test_an_offset_that_comes_again_under_a_later_epoch_is_new(record: Origin) -> None:
    seen = HighWaterMarks.of([record])
    later = record.model_copy(update={"leader_epoch": record.leader_epoch + 1})
    for offset in (0, record.offset):
        assert not seen.covers(later.model_copy(update={"offset": offset}))
    assert seen.raised([later]).covers(record)
    assert not seen.covers(record.model_copy(update={"offset": record.offset + 1}))


@given(origins, origins)
def test_what_has_a_lower_epoch_and_is_at_or_below_is_old(one: Origin, other: Origin) -> None:
    other = other.model_copy(update={"partition": one.partition})
    if (one.leader_epoch, one.offset) >= (other.leader_epoch, other.offset):
        assert HighWaterMarks.of([one]).covers(other)


@given(marks)
def test_the_two_stored_dicts_give_the_marks_back(some: HighWaterMarks) -> None:
    assert HighWaterMarks(some.offsets, some.epochs) == some
    assert all(some.epochs.values())
    assert hash(HighWaterMarks(some.offsets, some.epochs)) == hash(some)


def test_offsets_alone_are_marks_of_epoch_0() -> None:
    old = HighWaterMarks({"c/t/documents/0": 5})
    assert old.at("c/t/documents/0") == (0, 5)
    assert old.covers(origin(0, 0, 5))
    assert not old.covers(origin(0, 1, 5))
    assert not old.covers(origin(1, 0, 0))
    assert old.replaced("c/t/documents/0", (0, 3)).at("c/t/documents/0") == (0, 3)
    assert old.replaced("c/t/documents/0", None) == NO_MARKS
