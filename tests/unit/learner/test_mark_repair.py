"""A high-water mark that no log can have given is lowered, for curate and for the learner, while both run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from perennial.storage.errors import ConflictError, StoreError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry import mark_repairs
from perennial.storage.registry.mark_repairs import MarkRepair, add_mark_repair, load_mark_repairs, repaired_marks
from perennial.storage.registry.waiting_jobs import curate_state_key
from perennial.streams.cli.marks.mark_repair import repair_mark
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.high_water_marks import HighWaterMarks
from perennial.streams.events.models import ExampleAccepted, ExampleScored, RollbackRequested
from perennial.streams.settings import Settings
from tests import jobs, tiny
from tests.unit.learner.test_versions import local_learner

ADAPTER = "acme/support"
PARTITION = tiny.origin(0).partition_key()
SETTINGS = Settings.of(env_file=None)
HUGE = 2**63 - 1
TEXTS = ("a blue parrot", "an old lamp", "the north wind", "a red boat", "two grey cats", "one last word")


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path, fsync=False)


def documents(*numbers: int) -> list[ExampleAccepted]:
    return [tiny.document(n, TEXTS[n]) for n in numbers]


def forged_state(store: DirectoryStore) -> str:
    """Store a curate state whose mark a forged signal has raised, as a release before the checks did; return its etag."""
    batcher: MicroBatcher[int] = MicroBatcher(ADAPTER, CutPolicy.of(SETTINGS))
    forged = tiny.document(9, "x").model_copy(update={"learn": False, "origin": tiny.origin(9)})
    forged = forged.model_copy(update={"origin": forged.origin.model_copy(update={"offset": HUGE})})
    for example in (*documents(0, 1, 2), forged):
        batcher.offer(ExampleScored(example=example, tokens=1, base_loss_nats=1.0, live_loss_nats=1.0), 0, 0)
    return store.compare_and_swap(curate_state_key(ADAPTER), batcher.cut(datetime.now(UTC), "age").state, None)


def test_attack_a_a_mark_that_a_forged_record_raised_is_repaired_and_what_follows_is_learned(
    store: DirectoryStore,
) -> None:
    learner = local_learner(store)
    forged = jobs.update(store, 1, documents(0, 1, 2), high_water_mark=HUGE)
    learner.update(forged, "live")
    etag = forged_state(store)
    assert repair_mark(SETTINGS, learner.registry, ADAPTER, PARTITION, (0, 2), "ann", "forged") == [
        "manifest",
        "curate",
    ]
    assert repair_mark(SETTINGS, learner.registry, ADAPTER, PARTITION, (0, 2), "ann", "again") == []

    with pytest.raises(ConflictError):  # a curate agent that runs meanwhile loads the repaired state
        store.compare_and_swap(curate_state_key(ADAPTER), b"a cut on the state before", etag)
    curate = MicroBatcher.restore(ADAPTER, CutPolicy.of(SETTINGS), store.get(curate_state_key(ADAPTER)).data)
    assert curate.history.high_water_marks == HighWaterMarks({PARTITION: 2})
    scored = [ExampleScored(example=e, tokens=1, base_loss_nats=1.0, live_loss_nats=1.0) for e in documents(2, 3, 4)]
    assert [curate.offer(each, n, 0).covered for n, each in enumerate(scored)] == [True, False, False]

    for each in (learner, local_learner(store)):
        assert each.update(forged, "live").outcome == "repeated"
    done = learner.update(jobs.update(store, 2, documents(3, 4)), "live").manifest
    assert done is not None
    assert [example.offset for example in done.learned] == [3, 4]
    assert done.marks == {PARTITION: 4}
    learner.rollback(RollbackRequested(job_id="r", adapter=ADAPTER, requested_by="ann"))
    head = learner.head(ADAPTER)
    assert head is not None
    assert head.manifest.marks == {PARTITION: 4}
    (repair,) = load_mark_repairs(store, ADAPTER)
    assert (repair.wrong_offset, repair.offset, repair.by, repair.reason) == (HUGE, 2, "ann", "forged")


def test_a_version_that_takes_over_marks_before_the_next_update_has_the_repaired_ones(store: DirectoryStore) -> None:
    learner = local_learner(store)
    learner.update(jobs.update(store, 1, documents(0, 1)), "live")
    learner.update(jobs.update(store, 2, documents(2), high_water_mark=HUGE), "live")
    repair_mark(SETTINGS, learner.registry, ADAPTER, PARTITION, None, "ann", "")
    learner.rollback(RollbackRequested(job_id="r", adapter=ADAPTER, requested_by="ann"))
    head = learner.head(ADAPTER)
    assert head is not None
    assert (head.manifest.kind, head.manifest.marks) == ("rollback", {})


def repair(wrong: int, right: int | None, epoch: int = 0) -> MarkRepair:
    return MarkRepair(
        partition="p", wrong_epoch=epoch, wrong_offset=wrong, epoch=epoch, offset=right,
        at=datetime(2026, 1, 1, tzinfo=UTC), by="ann",
    )  # fmt: skip


def test_a_repair_changes_the_one_wrong_mark_alone() -> None:
    found = repaired_marks({"p": 9, "q": 9}, {"q": 1}, [repair(9, 5), repair(5, 3)])
    assert found == ({"p": 3, "q": 9}, {"q": 1})
    assert repaired_marks({"p": 8}, {}, [repair(9, 5)]) == ({"p": 8}, {})
    assert repaired_marks({"p": 9}, {"p": 2}, [repair(9, 5)]) == ({"p": 9}, {"p": 2})
    assert repaired_marks({"p": 9}, {"p": 2}, [repair(9, None, 2)]) == ({}, {})


def test_a_repair_of_the_same_mark_replaces_the_one_before_and_their_number_is_bounded(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_mark_repair(store, ADAPTER, repair(9, 5))
    add_mark_repair(store, ADAPTER, repair(9, 4))
    assert [each.offset for each in load_mark_repairs(store, ADAPTER)] == [4]
    monkeypatch.setattr(mark_repairs, "MAX_REPAIRS", 1)
    with pytest.raises(StoreError, match="too often"):
        add_mark_repair(store, ADAPTER, repair(8, 4))


def in_epoch(number: int, epoch: int, example_id: int) -> ExampleAccepted:
    origin = tiny.origin(number).model_copy(update={"leader_epoch": epoch})
    changes = {"origin": origin, "example_id": f"{example_id:032x}", "document_id": f"later-{number}"}
    return tiny.document(number, TEXTS[number]).model_copy(update=changes)


def test_attack_k_offsets_that_come_again_under_a_later_epoch_are_learned(store: DirectoryStore) -> None:
    learner = local_learner(store)
    learner.update(jobs.update(store, 1, documents(0, 1, 2)), "live")
    again = jobs.update(store, 2, [in_epoch(1, 3, 101), in_epoch(2, 3, 102)])
    again = again.model_copy(update={"epochs": {PARTITION: 3}})
    done = learner.update(again, "live").manifest
    assert done is not None
    assert [(example.offset, example.epoch) for example in done.learned] == [(1, 3), (2, 3)]
    assert (done.marks, done.epochs, done.dropped) == ({PARTITION: 2}, {PARTITION: 3}, 0)
    assert learner.update(again, "live").outcome == "repeated"
    late = learner.update(jobs.update(store, 3, [*documents(2), in_epoch(3, 3, 103)]), "live").manifest
    assert late is not None
    assert [(example.offset, example.epoch) for example in late.learned] == [(3, 3)]
    assert late.dropped == 1


def test_what_comes_back_within_a_micro_batch_is_learned_once_at_its_later_place(store: DirectoryStore) -> None:
    learner = local_learner(store)
    first, between, back = documents(0, 1, 2)
    back = back.model_copy(update={"example_id": first.example_id, "text": first.text, "returned": True})
    done = learner.update(jobs.update(store, 1, [first, between, back]), "live").manifest
    assert done is not None
    assert [example.offset for example in done.learned] == [1, 2]
    assert [(skip.offset, skip.reason) for skip in done.skipped] == [(0, "duplicate")]
    later = tiny.document(3, TEXTS[0]).model_copy(update={"example_id": first.example_id, "returned": True})
    done = learner.update(jobs.update(store, 2, [later]), "live").manifest
    assert done is not None
    assert [example.offset for example in done.learned] == [3]
