"""MicroBatcher: each example is in exactly one cut, whatever is delivered twice, lost or restored."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.storage.errors import IntegrityError
from perennial.streams.curate.batcher import MAX_SKIPPED, MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.curate.offsets import OffsetTracker
from perennial.streams.curate.recent_ids import RECENT_IDS, RecentIds
from perennial.streams.events.high_water_marks import HighWaterMarks
from perennial.streams.events.models import Batch, ExampleAccepted, ExampleScored, Origin, UpdateRequested

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = CutPolicy(max_tokens=100, max_examples=8, min_examples=3, max_age_ms=1000, cooldown_examples=16, window=64)


def scored(
    number, *, partition=0, identity=None, tokens=10, learn=True, loss=3.0, generation=0, expires=None, epoch=0,
    returned=False,
):  # fmt: skip
    example = ExampleAccepted(
        adapter="a", example_id=f"{number if identity is None else identity:032x}"[::-1], kind="document",
        document_id=f"d{number}", learn=learn, text=f"t{number}", expires_at=expires,
        returned=returned,
        origin=Origin(
            cluster_id="c", topic="documents", topic_id="t", partition=partition, leader_epoch=epoch, offset=number,
            timestamp_ms=number,
        ),
    )  # fmt: skip
    return ExampleScored(
        example=example, tokens=tokens, base_loss_nats=loss, live_loss_nats=loss, live_generation=generation
    )


def documents(cut) -> list[str]:
    return [example.document_id for example in Batch.model_validate_json(cut.body).examples]


def test_cuts_exactly_when_tokens_or_examples_reach_their_bound():
    batcher = MicroBatcher("a", POLICY)
    assert [batcher.offer(scored(n), n, 0).reason for n in range(8)] == [None] * 7 + ["size"]
    batcher.apply(batcher.cut(NOW, "size"))
    assert [batcher.offer(scored(n, tokens=40), n, 0).reason for n in range(8, 11)] == [None, None, "size"]


def test_a_job_says_what_the_batch_holds():
    batcher = MicroBatcher("a", POLICY)
    for n in range(3):
        batcher.offer(scored(n), n, 0)
    batcher.offer(scored(3, learn=False), 3, 0)
    batcher.offer(scored(4, expires=NOW), 4, 0)
    cut = batcher.cut(NOW, "age")
    batch = Batch.model_validate_json(cut.body)
    job = cut.job
    assert (job.cut, job.examples, job.skipped, job.tokens, job.reason) == (0, 3, 2, 30, "age")
    assert (job.oldest_ms, job.newest_ms, job.batch.size_bytes) == (0, 2, len(cut.body))
    assert job.marks == {"c/t/documents/0": 4}
    assert [(skip.origin.offset, skip.reason) for skip in batch.skipped] == [(3, "signal"), (4, "expired")]
    assert batcher.apply(cut) == [0, 1, 2, 3, 4]
    assert batcher.idle


def test_a_cut_that_is_not_stored_changes_nothing():
    batcher, untouched = MicroBatcher("a", POLICY), MicroBatcher("a", POLICY)
    for n in range(6):
        for each in (batcher, untouched):
            each.offer(scored(n, learn=n != 1), n, 0)
    first = batcher.cut(NOW, "size", {scored(3).example.example_id})
    assert [batcher.cut(NOW, "size", {scored(3).example.example_id}) for _ in range(3)] == [first] * 3
    batcher.flush()
    batcher.fence()
    assert batcher.history == untouched.history
    assert batcher.cut(NOW, "age") == untouched.cut(NOW, "age")
    assert batcher.pending_deliveries() == untouched.pending_deliveries()
    assert not batcher.idle


def test_a_fence_changes_only_the_bytes():
    batcher = MicroBatcher("a", POLICY)
    batcher.offer(scored(0), 0, 0)
    cut = batcher.cut(NOW, "age")
    restored = MicroBatcher.restore("a", POLICY, cut.state)
    fence = restored.fence()
    assert (fence.body, fence.job, restored.apply(fence)) == (None, None, [])
    assert {k: v for k, v in json.loads(fence.state).items() if k != "fences"} == {
        k: v for k, v in json.loads(cut.state).items() if k != "fences"
    }
    assert restored.fence().state != fence.state != cut.state


def test_what_expires_later_is_learned():
    batcher = MicroBatcher("a", POLICY)
    batcher.offer(scored(0, expires=NOW + timedelta(seconds=1)), 0, 0)
    assert documents(batcher.cut(NOW, "age")) == ["d0"]


def test_a_redelivery_counts_once_and_both_deliveries_are_given_back():
    batcher = MicroBatcher("a", POLICY)
    for token, n in enumerate((0, 1, 0, 1, 2)):
        assert not batcher.offer(scored(n), token, 0).covered
    cut = batcher.cut(NOW, "age")
    assert documents(cut) == ["d0", "d1", "d2"]
    assert sorted(batcher.apply(cut)) == [0, 1, 2, 3, 4]
    assert batcher.offer(scored(1), 5, 0).covered


def test_the_same_example_from_another_partition_is_a_duplicate():
    batcher = MicroBatcher("a", POLICY)
    batcher.offer(scored(0, identity=7), 0, 0)
    batcher.apply(batcher.cut(NOW, "age"))
    batcher.offer(scored(5, partition=1, identity=7), 1, 0)
    batcher.offer(scored(6, partition=1), 2, 0)
    batch = Batch.model_validate_json(batcher.cut(NOW, "age").body)
    assert [example.document_id for example in batch.examples] == ["d6"]
    assert [skip.reason for skip in batch.skipped] == ["duplicate"]


def test_age_counts_from_the_first_delivery_and_skips_alone_make_no_job():
    batcher = MicroBatcher("a", POLICY)
    batcher.offer(scored(0, learn=False), 0, 5000)
    assert batcher.due(5999) is None
    assert batcher.due(6000) == "flush"
    flushed = batcher.flush()
    assert (flushed.body, flushed.job) == (None, None)
    assert batcher.apply(flushed) == [0]
    restored = MicroBatcher.restore("a", POLICY, flushed.state)
    assert restored.offer(scored(0, learn=False), 1, 0).covered
    restored.offer(scored(1), 2, 7000)
    assert restored.due(8000) == "age"
    batch = Batch.model_validate_json(restored.cut(NOW, "age").body)
    assert [skip.origin.offset for skip in batch.skipped] == [0]


def test_few_tokens_wait_longer_but_not_for_ever_and_not_with_a_correction():
    batcher = MicroBatcher("a", replace(POLICY, min_tokens=25))
    batcher.offer(scored(0), 0, 5000)
    batcher.offer(scored(1), 1, 5500)
    assert [batcher.aged(5999), batcher.aged(6000)] == [False, True]
    assert [batcher.due(now) for now in (6000, 8999, 9000)] == [None, None, "age"]
    batcher.offer(scored(2), 2, 6100)
    assert batcher.due(6100) == "age"
    batcher.apply(batcher.cut(NOW, "age"))
    batcher.offer(scored(3), 3, 7000)
    document = scored(4)
    said = {"kind": "correction", "text": None, "prompt": "Who is on call?", "answer": "Ada is."}
    correction = document.model_copy(update={"example": document.example.model_copy(update=said)})
    assert batcher.due(8000) is None
    batcher.offer(correction, 4, 7900)
    assert batcher.due(8000) == "age"


def test_where_nothing_is_to_be_learned_a_minimum_of_tokens_delays_nothing():
    batcher = MicroBatcher("a", replace(POLICY, min_tokens=25))
    batcher.offer(scored(0, learn=False), 0, 5000)
    assert batcher.due(6000) == "flush"


def test_many_skips_make_a_cut_without_examples():
    batcher = MicroBatcher("a", POLICY)
    reasons = [batcher.offer(scored(n, learn=False), n, 0).reason for n in range(MAX_SKIPPED)]
    assert reasons == [None] * (MAX_SKIPPED - 1) + ["size"]
    job = batcher.cut(NOW, "size").job
    assert (job.examples, job.skipped, job.marks) == (0, MAX_SKIPPED, {"c/t/documents/0": MAX_SKIPPED - 1})


BIG = CutPolicy(max_tokens=10**9, max_examples=10**9, min_examples=3, max_age_ms=1000, cooldown_examples=16, window=512)


def run_drift(batcher, start, count, loss, generation=0):
    rng = random.Random(start)
    reasons = []
    for n in range(start, start + count):
        offer = batcher.offer(scored(n, loss=rng.gauss(loss, 0.3), generation=generation), n, 0)
        reasons.append(offer.reason)
        if n % 40 == 39 or offer.reason:
            batcher.apply(batcher.cut(NOW, offer.reason or "age"))
    return reasons


def test_drift_cuts_once_enough_examples_are_pending():
    batcher = MicroBatcher("a", BIG)
    assert set(run_drift(batcher, 0, 400, 3.0)) == {None}
    reasons = run_drift(batcher, 400, 100, 5.0)
    assert "drift" in reasons
    assert batcher.history.cuts > 0


def test_drift_does_not_cut_in_the_cool_down_after_a_swap():
    cooling = CutPolicy(10**9, 10**9, 3, 1000, cooldown_examples=10**6, window=512)
    batcher = MicroBatcher("a", cooling)
    run_drift(batcher, 0, 400, 3.0, generation=1)
    found = []
    rng = random.Random(1)
    for n in range(400, 600):
        offer = batcher.offer(scored(n, loss=rng.gauss(6.0, 0.3), generation=2 if n == 400 else 1), n, 0)
        found += offer.drifts
        assert offer.reason is None
    assert {drift.signal for drift in found} >= {"base_loss"}


def swapped(batcher, losses_of, count, seed=0):
    """Offer examples with (base loss, live loss, generation) and return the signals of the drift that is found."""
    rng = random.Random(seed)
    found = []
    for n in range(count):
        base, live, generation = losses_of(n)
        each = scored(n, loss=rng.gauss(base, 0.3), generation=generation)
        offer = batcher.offer(each.model_copy(update={"live_loss_nats": rng.gauss(live, 0.3)}), n, 0)
        found += [drift.signal for drift in offer.drifts]
        if n % 12 == 11 or offer.reason:
            batcher.apply(batcher.cut(NOW, offer.reason or "age"))
    return found


@pytest.mark.parametrize("gain", [0.3, 1.0, -0.5])
def test_swaps_that_move_the_live_loss_are_no_drift(gain):
    """Each version is better than the one before by the gain, in nats; after a rollback (a negative gain) it is worse."""
    moved = swapped(MicroBatcher("a", BIG), lambda n: (3.0, 3.0 - gain * (n // 400), 1 + n // 400), 2000)
    assert moved == []


def test_losses_under_a_version_that_was_live_before_are_no_drift():
    """After a rebalance a scorer may hold the version before for some seconds: its losses come after those of the new one."""
    late = range(700, 760)
    moved = swapped(MicroBatcher("a", BIG), lambda n: (3.0, 3.0, 1) if n < 300 or n in late else (3.0, 1.5, 2), 1000)
    assert moved == []


def test_a_restored_batcher_goes_on_like_the_live_one():
    live = MicroBatcher("a", POLICY)
    for n in range(5):
        live.offer(scored(n), n, 0)
    cut = live.cut(NOW, "age")
    live.apply(cut)
    restored = MicroBatcher.restore("a", POLICY, cut.state)
    assert restored.history.last_job == cut.job
    for n in range(5, 300):
        left, right = (c.offer(scored(n, loss=3 + (n > 200)), n, 0) for c in (live, restored))
        assert left == right
        if left.reason:
            one, other = live.cut(NOW, left.reason), restored.cut(NOW, right.reason)
            assert one == other
            assert live.apply(one) == restored.apply(other)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_crashes_and_redeliveries_at_random_leave_each_example_in_one_cut(seed):
    """The producer and the consumer of a log of two origin partitions both restart from earlier offsets at random.

    An origin partition loses its tail now and then, after it was read: the offsets come again under a later epoch.
    """
    rng = random.Random(seed)
    log: list[tuple[int, int, int]] = []
    at, epochs = {0: 0, 1: 0}, {0: 0, 1: 0}
    while len(log) < 80:
        partition = rng.randrange(2)
        if rng.random() < 0.05:
            at[partition], epochs[partition] = max(0, at[partition] - rng.randint(1, 6)), epochs[partition] + 1
        log.append((partition, epochs[partition], at[partition]))
        at[partition] += 1
        if rng.random() < 0.1:  # the role before curate crashed and publishes the end of its log a second time
            log.extend(log[-rng.randint(1, 5) :])
    state, committed, batches, tracker = None, 0, {}, OffsetTracker()
    position, crashes = 0, 0
    batcher = MicroBatcher("a", POLICY)
    while position < len(log):
        if rng.random() < 0.06 and crashes < 8:
            crashes += 1
            position, tracker = committed, OffsetTracker()
            batcher = MicroBatcher("a", POLICY) if state is None else MicroBatcher.restore("a", POLICY, state)
            continue
        tracker.add(position, position)
        partition, epoch, offset = log[position]
        identity = (epoch * 100 + offset) * 2 + partition
        offer = batcher.offer(scored(offset, partition=partition, identity=identity, epoch=epoch), position, 0)
        assert offer.out_of_order is None
        done = [position] if offer.covered else []
        position += 1
        if offer.reason or (position == len(log) and not batcher.idle):
            cut = batcher.cut(NOW, offer.reason or "age")
            if rng.random() < 0.2 and crashes < 8:  # before the state is stored: as if it had not been cut
                crashes += 1
                position, tracker = committed, OffsetTracker()
                batcher = MicroBatcher("a", POLICY) if state is None else MicroBatcher.restore("a", POLICY, state)
                continue
            state = cut.state
            assert batches.setdefault(cut.job.cut, cut.body) == cut.body
            done += batcher.apply(cut)
        for token in done:
            tracker.complete(token)
        for token in tracker.releasable():
            committed = token + 1
    learned = Counter(
        (e.origin.partition, e.origin.leader_epoch, e.origin.offset)
        for body in batches.values()
        for e in Batch.model_validate_json(body).examples
    )
    assert learned == Counter(set(log))


def test_a_state_that_an_earlier_release_stored_is_restored_and_written_again_alike():
    """The file was written before marks had epochs; new fields must have defaults."""
    stored = (Path(__file__).parent / "data/curate_state_v1.json").read_bytes()
    policy = CutPolicy(400, 60, 3, 1000, 16, 64)
    batcher = MicroBatcher.restore("acme/a", policy, stored)
    assert (batcher.history.cuts, batcher.history.fences) == (36, 5)
    marks = {"marks": {"c/t/documents/0": 699, "c/t/documents/1": 698}, "epochs": {}}
    assert batcher.history.high_water_marks == HighWaterMarks(marks["marks"])
    assert batcher.history.last_job.cut == 35
    data = json.loads(stored)
    reach = {"added": 0, "floor": marks, "floor_added": 0, "next_floor": marks, "next_added": 0}
    fenced = batcher.fence().state
    job = UpdateRequested.model_validate(data["job"]).model_dump(mode="json")
    assert data["job"].items() <= job.items()
    assert json.loads(fenced) == data | {"fences": 6, "version": 2, "epochs": {}, "reach": reach, "job": job}
    again = MicroBatcher.restore("acme/a", policy, fenced)
    assert again.history == batcher.fence().history
    assert batcher.offer(scored(699), 0, 0).covered
    assert not batcher.offer(scored(700), 0, 0).covered


def drained(batcher, deliveries):
    """Offer examples in this order and cut whenever it is asked for; return learned, out of order, acknowledged."""
    learned, out_of_order, acknowledged = [], [], []
    for token, each in enumerate(deliveries):
        offer = batcher.offer(each, token, 0)
        if offer.out_of_order is not None:
            out_of_order.append(each.example.origin.offset)
        if offer.covered:
            acknowledged.append(token)
        if offer.reason or token == len(deliveries) - 1:
            cut = batcher.cut(NOW, offer.reason or "age")
            learned += [e.origin.offset for e in Batch.model_validate_json(cut.body).examples]
            acknowledged += batcher.apply(cut)
    return learned, out_of_order, acknowledged


@pytest.mark.parametrize("policy", [POLICY, CutPolicy(10**9, 10**9, 3, 1000, 16, 64)], ids=["many cuts", "one cut"])
def test_attack_c_none_of_700_is_gone_without_a_word(policy):
    """Partitions were added under a backlog: 100 new examples arrive before the 600 that wait on the old partition."""
    offered = [scored(n, identity=n + 1) for n in (*range(600, 700), *range(600))]
    learned, out_of_order, acknowledged = drained(MicroBatcher("a", policy), offered)
    assert sorted(learned + out_of_order) == list(range(700))
    assert out_of_order == list(range(600))
    assert len(acknowledged) == 100


def test_attack_c_what_is_delivered_out_of_order_is_told_from_redeliveries_after_a_restart():
    """The stored state knows how far back its recent ids reach."""
    batcher = MicroBatcher("a", POLICY)
    for start in (0, RECENT_IDS, 2 * RECENT_IDS):
        drained(batcher, [scored(n) for n in range(start, start + RECENT_IDS)])
    drained(batcher, [scored(n) for n in range(3 * RECENT_IDS + 600, 3 * RECENT_IDS + 700)])
    restored = MicroBatcher.restore("a", POLICY, batcher.fence().state)
    for each in (batcher, restored):
        late = [each.offer(scored(n), 0, 0) for n in range(3 * RECENT_IDS, 3 * RECENT_IDS + 600)]
        assert {offer.out_of_order for offer in late} == {(0, 3 * RECENT_IDS + 699)}
        seen = (0, 5, RECENT_IDS, 3 * RECENT_IDS - 1, 3 * RECENT_IDS + 650)
        assert all(each.offer(scored(n), 0, 0).covered for n in seen)


def test_attack_k_the_same_offsets_under_a_later_epoch_are_new():
    """A broker that stopped uncleanly lost a log's tail and gave its offsets again to other documents."""
    batcher = MicroBatcher("a", POLICY)
    drained(batcher, [scored(n, identity=n + 1, epoch=2) for n in range(786, 806)])
    restored = MicroBatcher.restore("a", POLICY, batcher.fence().state)
    learned, out_of_order, _ = drained(restored, [scored(n, identity=n + 5000, epoch=3) for n in range(796, 806)])
    assert (learned, out_of_order) == (list(range(796, 806)), [])
    assert restored.history.high_water_marks == HighWaterMarks({"c/t/documents/0": 805}, {"c/t/documents/0": 3})
    assert restored.offer(scored(805, identity=806, epoch=2), 0, 0).covered
    assert restored.history.last_job.epochs == {"c/t/documents/0": 3}


def test_what_intake_returns_is_no_duplicate_of_its_first_time():
    batcher = MicroBatcher("a", POLICY)
    drained(batcher, [scored(0, identity=7), scored(1, identity=8)])
    learned, _, _ = drained(batcher, [scored(2, identity=7), scored(3, identity=7, returned=True)])
    assert learned == [3]


def test_a_state_of_another_adapter_or_of_nothing_is_refused():
    batcher = MicroBatcher("a", POLICY)
    batcher.offer(scored(0), 0, 0)
    state = batcher.cut(NOW, "age").state
    with pytest.raises(IntegrityError):
        MicroBatcher.restore("b", POLICY, state)
    for junk in (b"", b"[]", b"{}", state[:-9], json.dumps({**json.loads(state), "recent": "%"}).encode()):
        with pytest.raises(IntegrityError):
            MicroBatcher.restore("a", POLICY, junk)


def test_recent_ids_forget_the_oldest_only_and_survive_bytes():
    ids = RecentIds()
    names = [f"{n:016x}" for n in range(RECENT_IDS + 100)]
    assert all(ids.add(name) for name in names)
    restored = RecentIds(ids.to_bytes())
    for held in (ids, restored):
        assert not any(held.add(name) for name in names[100:])
        assert held.add(names[0])
        assert not held.add(names[-1])
    assert ids.to_bytes() == restored.to_bytes()


def test_deliveries_are_acknowledged_in_order_and_without_holes():
    tracker = OffsetTracker()
    for offset in (5, 6, 7):
        assert tracker.add(offset, offset)
    assert not tracker.add(6, 6)
    tracker.complete(6)
    assert list(tracker.releasable()) == []
    tracker.complete(5)
    assert list(tracker.releasable()) == [5, 6]
    with pytest.raises(IntegrityError):
        tracker.add(9, 9)


def test_a_micro_batch_names_skipped_records_by_their_positions():
    """The id of an example is a hash of its text, and a forgetting does not reach the skipped ones."""
    batcher = MicroBatcher("a", POLICY)
    for n, more in enumerate(({}, {"learn": False}, {"expires": NOW})):
        batcher.offer(scored(n, **more), n, 0)
    example = scored(0).example
    again = example.model_copy(update={"origin": example.origin.model_copy(update={"offset": 3})})
    batcher.offer(scored(0).model_copy(update={"example": again}), 3, 0)
    blocked = [example.example_id]
    batch = Batch.model_validate_json(batcher.cut(NOW, "age", blocked).body)
    skips = [(skip.origin.offset, skip.reason) for skip in batch.skipped]
    assert skips == [(1, "signal"), (3, "duplicate"), (0, "quarantined"), (2, "expired")]
    ids = [skip.example_id for skip in batch.skipped]
    assert len(set(ids)) == 4
    assert not {scored(n).example.example_id for n in range(3)} & set(ids)
    assert [len(name) for name in ids] == [len(example.example_id)] * 4
