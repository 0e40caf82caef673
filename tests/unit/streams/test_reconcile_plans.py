"""Where groups read again after a restore, how aliases go on, and what keeps roles from starting before that."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from perennial.learner.versions.alias_events import alias_event
from perennial.storage.recovery.restored_store import RECORD_KEY, RestoredBackup, end_restore
from perennial.storage.registry.compare_and_swap import AliasWriter
from perennial.storage.registry.registry import AliasState
from perennial.storage.signing.trust import Trust
from perennial.streams.events.cloudevents import encode
from perennial.streams.kafka.event_signatures import signed_event
from perennial.streams.kafka.installation import InstallationError, require_reconciled
from perennial.streams.recovery.alias_plan import WAITS, resumed_alias
from perennial.streams.recovery.announced import Announced
from perennial.streams.recovery.kafka_positions import KafkaPositions
from perennial.streams.recovery.offset_plan import MARGIN_MS, LogRange, plan_offsets
from perennial.streams.recovery.reconcile import evidence_of_age, newest_trace_ms
from tests.keys import Keys
from tests.memory_store import MemoryStore
from tests.versions import VersionPublisher

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAY_MS = 24 * 3_600_000
VERSIONS = [f"sha256:{digit * 64}" for digit in "abc"]


def logs(**ranges: tuple[int, int, int | None]) -> dict[str, list[LogRange]]:
    """Return one log of one partition per topic: begin, end, and the wanted offset."""
    every = {"scored-examples": (0, 0, 0), "examples": (0, 0, 0), "documents": (0, 0, 0), "adapter-jobs": (0, 9, 2)}
    named = {name.replace("_", "-"): found for name, found in ranges.items()}
    return {
        topic: [LogRange(0, begin, end, wanted, first_ms=NOW_MS - DAY_MS)]
        for topic, (begin, end, wanted) in {**every, **named}.items()
    }


NOW_MS = int(NOW.timestamp() * 1000)


def test_curate_alone_reads_again_where_the_scored_examples_reach_back_to_the_backup():
    plan = plan_offsets(logs(scored_examples=(40, 100, 60), examples=(0, 90, 50), documents=(0, 80, 45)), None)
    assert plan.commits == {"curate": {"scored-examples": {0: 60}}, "learner": {"adapter-jobs": {0: 9}}}
    assert (plan.lost, plan.unknown) == ({}, [])


def test_each_log_that_is_too_short_sends_the_one_before_it_back():
    plan = plan_offsets(logs(scored_examples=(70, 100, 60), examples=(50, 90, 50)), None)
    assert plan.commits["curate"] == {"scored-examples": {0: 70}}
    assert plan.commits["scorer"] == {"examples": {0: 50}}
    assert "intake" not in plan.commits
    assert plan.lost == {}
    plan = plan_offsets(logs(scored_examples=(70, 100, 60), examples=(51, 90, 50), documents=(10, 80, 45)), None)
    assert plan.commits["intake"] == {"documents": {0: 45}, "interactions": {}}
    assert plan.lost == {}


def test_what_is_gone_is_counted_in_the_log_that_holds_the_most():
    plan = plan_offsets(logs(scored_examples=(70, 100, 60), examples=(53, 90, 50), documents=(80, 80, 45)), None)
    assert plan.lost == {"examples": 3}
    assert plan.commits["intake"]["documents"] == {0: 80}


def test_an_offset_beyond_the_log_s_end_counts_as_its_end():
    assert plan_offsets(logs(scored_examples=(0, 5, 60)), None).commits["curate"] == {"scored-examples": {0: 5}}


@pytest.mark.parametrize(
    ("begin", "store_ms", "is_unknown"),
    [(0, None, False), (7, None, True), (7, NOW_MS, False), (7, NOW_MS - 2 * DAY_MS, True),
     (7, NOW_MS - DAY_MS + MARGIN_MS, False), (7, NOW_MS - DAY_MS + MARGIN_MS - 1, True)],
)  # fmt: skip
def test_without_a_record_a_log_must_begin_a_day_before_the_store_s_newest_trace(begin, store_ms, is_unknown):
    ranges = dict.fromkeys(("scored_examples", "examples", "documents"), (begin, 100, None))
    plan = plan_offsets(logs(**ranges), store_ms)
    assert plan.commits["curate"] == {"scored-examples": {0: begin}}
    assert bool(plan.unknown) == is_unknown
    assert ("intake" in plan.commits) == is_unknown


def test_offsets_of_another_topic_or_cluster_count_for_nothing():
    found = KafkaPositions(cluster_id="c", topic_ids={"documents": "t"}, offsets={"documents": {0: 7}})
    assert found.recorded("documents", "t", "c") == {0: 7}
    assert found.recorded("documents", "another", "c") == {}
    assert found.recorded("documents", "t", "another") == {}
    assert KafkaPositions.model_validate(found.model_dump(mode="json")) == found


def alias(generation: int = 4, seq: int = 4, version: str = VERSIONS[0], kind: str = "promoted") -> AliasState:
    return AliasState(
        adapter="acme/a", alias="live", generation=generation, version=version, seq=seq, kind=kind,
        previous_version=None, reason="size", published_at=NOW, nonce="n",
    )  # fmt: skip


def test_an_alias_goes_on_above_all_that_was_announced():
    resumed = resumed_alias(alias(4), None, 9, VERSIONS[1], holds_erased=False)
    assert (resumed.generation, resumed.version, resumed.kind) == (10, VERSIONS[0], "promoted")


@pytest.mark.parametrize(("announced", "version"), [(0, None), (3, VERSIONS[1]), (4, VERSIONS[0]), (4, None)])
def test_an_alias_that_nothing_was_announced_of_since_stays_as_it_is(announced, version):
    assert resumed_alias(alias(4), None, announced, version, holds_erased=False) == alias(4)


def test_a_generation_that_was_announced_with_another_version_is_not_used_again():
    assert resumed_alias(alias(4), None, 4, VERSIONS[1], holds_erased=False).generation == 5


@pytest.mark.parametrize(("announced", "wanted"), [(0, 4), (4, 4), (9, 9)])
def test_a_version_that_holds_erased_text_is_retired_and_runs_nobody_over(announced, wanted):
    """A running subscriber at that generation keeps its own, later version; the rebuilt one is above both."""
    resumed = resumed_alias(alias(4), None, announced, VERSIONS[1], holds_erased=True)
    assert (resumed.generation, resumed.kind, resumed.reason) == (wanted, "retired", WAITS)


def test_a_version_whose_learner_had_not_moved_the_alias_is_the_one_that_is_served():
    resumed = resumed_alias(alias(4), (5, VERSIONS[2]), 9, VERSIONS[1], holds_erased=False)
    assert (resumed.generation, resumed.seq, resumed.version, resumed.previous_version) == (
        10, 5, VERSIONS[2], VERSIONS[0],
    )  # fmt: skip
    held = resumed_alias(alias(4), (5, VERSIONS[2]), 9, VERSIONS[1], holds_erased=True)
    assert (held.generation, held.seq, held.kind) == (9, 5, "retired")


def test_an_alias_that_the_store_lacks_begins_above_its_floor_and_floors_only_rise():
    store = MemoryStore()
    writer = AliasWriter(store, lambda: "nonce", lambda: NOW, Trust())
    for generation in (6, 3):
        writer.raise_floor("acme/support", "live", generation)
    publisher = VersionPublisher(store)
    assert [publisher.publish().generation for _ in range(2)] == [7, 8]
    assert VersionPublisher(store, "other").publish().generation == 1


def test_a_store_is_older_where_a_generation_was_announced_that_it_lacks():
    store, announced = MemoryStore(), Announced()
    state = VersionPublisher(store).publish()
    assert evidence_of_age(store, announced) == []
    announced.note("acme/support", "live", 1, state.version)
    assert evidence_of_age(store, announced) == []
    announced.note("acme/support", "live", 3)
    announced.note("acme/support", "live", 2, state.version)
    announced.note("other", "live", 5)
    assert [line.partition(" ")[0] for line in evidence_of_age(store, announced)] == ["acme/support#live", "other#live"]
    assert len(evidence_of_age(store, announced, limit=1)) == 1


def test_an_alias_that_begins_above_what_was_announced_is_no_sign_of_age():
    """A reconciliation notes that for adapters that were made after the backup."""
    store, announced = MemoryStore(), Announced()
    announced.note("made/since", "live", 5)
    writer = AliasWriter(store, lambda: "nonce", lambda: NOW, Trust())
    writer.raise_floor("made/since", "live", 4)
    assert evidence_of_age(store, announced) == ["made/since#live has generation 4, and 5 was announced"]
    writer.raise_floor("made/since", "live", 5)
    assert evidence_of_age(store, announced) == []


def update_record(trust: Trust, generation: int) -> SimpleNamespace:
    """A record of `adapter-updates`, signed as the learner signs it."""
    publisher = VersionPublisher(MemoryStore(), "acme/a")
    event = alias_event(publisher.registry, publisher.publish().model_copy(update={"generation": generation}))
    made = encode(signed_event(event, trust), event_id="e", source="test", occurred_at=NOW)
    return SimpleNamespace(value=made.value, headers=made.headers)


def test_events_count_where_a_trusted_key_signed_them_and_unread_ones_are_passed_over(tmp_path):
    keys, announced = Keys(tmp_path), Announced()
    announced.note_event(update_record(keys.owner, 3), keys.readers)
    for trust in (keys.stranger, Trust()):
        announced.note_event(update_record(trust, 7), keys.readers)
    announced.note_event(SimpleNamespace(value=b"{", headers=[]), keys.readers)
    assert announced.generations == {("acme/a", "live"): 3}
    assert announced.unproven == 2
    announced.note_event(update_record(keys.stranger, 7), Trust())
    assert announced.by_name() == {"acme/a#live": 7}, "without trusted keys no signature is asked for"


def test_no_generation_is_gone_on_from_that_no_installation_reaches():
    announced = Announced()
    announced.note("acme/a", "live", 10**12 + 1)
    announced.note_event(update_record(Trust(), 10**15), Trust())
    assert announced.generations == {}
    announced.note("acme/a", "live", 10**12)
    assert announced.generations == {("acme/a", "live"): 10**12}


def test_what_a_replica_says_that_it_serves_is_no_sign_of_age():
    store, announced = MemoryStore(), Announced()
    announced.note_acknowledged("acme/a", "live", 9)
    announced.note_acknowledged("acme/a", "live", 7)
    assert announced.acknowledged == {("acme/a", "live"): 9}
    assert evidence_of_age(store, announced) == []
    assert announced.by_name() == {}


def test_the_newest_trace_of_a_store_is_retain_s_clock_or_its_youngest_alias():
    store = MemoryStore()
    assert newest_trace_ms(store) is None
    state = VersionPublisher(store).publish()
    assert newest_trace_ms(store) == int(state.published_at.timestamp() * 1000)
    store.put_if_absent("retention/clock", b'{"shown_ms": 17}')
    assert newest_trace_ms(store) == 17


def test_no_role_starts_on_a_restored_store_before_it_is_reconciled():
    store = MemoryStore()
    require_reconciled(store)
    record = RestoredBackup(backup_id="20260301T000000Z-abcd", began_at=NOW, copied=True)
    store.put_if_absent(RECORD_KEY, record.to_bytes())
    with pytest.raises(InstallationError, match="not reconciled") as raised:
        require_reconciled(store)
    assert "perennial backup reconcile" in raised.value.remedy
    end_restore(store)
    require_reconciled(store)
