"""Update jobs in the order of their cuts, parked adapters, and refused examples, over a directory store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from perennial.learner.model.loss import OutOfMemoryError
from perennial.learner.roles.job_runner import JobRunner
from perennial.learner.roles.parking import report_parked
from perennial.learner.versions.job_result import JobError, JobInterruptedError
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.storage.errors import NoSpaceError, StoreUnavailableError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key, digest_of
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.manifest import SCHEMA_VERSION
from perennial.storage.registry.parked import load_parked, unpark_adapter
from perennial.storage.registry.pending_deletes import list_pending_deletes
from perennial.storage.registry.records import Claim, manifest_key, version_key
from perennial.storage.registry.refused_examples import load_refused_examples
from perennial.storage.registry.waiting_jobs import delete_job, job_key, list_jobs, load_given_up, load_job, put_job
from perennial.streams.events.adapter_events import AdapterUpdate
from perennial.streams.events.models import ForgetRequested, UpdateRequested
from perennial.streams.observe.metrics import Metrics
from tests import jobs, tiny
from tests.local_learner import LocalLearner
from tests.unit.learner.test_versions import ADAPTER, documents, local_learner, now


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def runner(learner: LocalLearner, sent: list[AdapterUpdate] | None = None) -> JobRunner:
    events = [] if sent is None else sent
    return JobRunner(learner, "live", now, lambda _: None, events.append, lambda: None)


def cut_of(store: DirectoryStore, cut: int, adapter: str = ADAPTER, per_cut: int = 4) -> UpdateRequested:
    """Cut `per_cut` documents and leave the job waiting in the store, as curate does."""
    numbers = range(cut * per_cut, (cut + 1) * per_cut)
    examples = [tiny.document(n, f"the blue parrot {n} sings at noon", adapter=adapter) for n in numbers]
    return jobs.waiting(store, jobs.update(store, cut, examples, adapter=adapter))


def learned(learner: LocalLearner, adapter: str = ADAPTER) -> list[int]:
    """Return the offsets of everything learned, in the order of the versions."""
    return [
        example.offset
        for _, version in learner.registry.versions(adapter, newest_first=False)
        for example in learner.registry.manifest(adapter, version).learned
    ]


def flip_a_bit(path: Path) -> Callable[[], None]:
    """Flip one bit of a file; return a function that restores it."""
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    return lambda: path.write_bytes(data) and None


def test_case_14_later_cuts_that_arrive_first_wait_for_those_in_the_store(store: DirectoryStore) -> None:
    """Case 14: partitions were added while jobs waited, so v4 and v5 arrive before v2 and v3: all 20 are learned."""
    learner = local_learner(store)
    sent: list[AdapterUpdate] = []
    role = runner(learner, sent)
    cuts = [cut_of(store, cut) for cut in range(5)]
    assert role.run(cuts[0]).outcome == "promoted"
    for job in (cuts[3], cuts[4]):
        assert role.run(job).outcome == "promoted"
    assert [event.seq for event in sent] == [2, 3], "the updates that were taken from the store are announced, too"
    for job in (cuts[1], cuts[2], cuts[3]):
        assert role.run(job).outcome == "repeated"
    assert learned(learner) == list(range(20))
    assert list(list_jobs(store, ADAPTER)) == []
    assert load_parked(store, ADAPTER) is None


def test_case_14_an_adapter_without_a_version_learns_its_first_cuts_first(store: DirectoryStore) -> None:
    learner = local_learner(store)
    cuts = [cut_of(store, cut) for cut in range(2)]
    runner(learner).run(cuts[1])
    assert learned(learner) == list(range(8))


def test_case_14_a_cut_that_is_missing_is_waited_for(store: DirectoryStore) -> None:
    """The job of cut 1 is in the store no more when cut 2 arrives: nothing is learned before it, and it is said."""
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(4)]
    role.run(cuts[0])
    delete_job(store, ADAPTER, 1)
    assert role.run(cuts[2]).outcome == "parked"
    record = load_parked(store, ADAPTER)
    assert record is not None
    assert (record.reason, record.cut) == ("missing-cut", 2)
    assert job_key(ADAPTER, 1) in record.detail
    assert role.run(cuts[3]).outcome == "parked"
    assert learned(learner) == [0, 1, 2, 3]
    assert role.run(cuts[1]).outcome == "promoted"  # its record was in Kafka after all
    assert learned(learner) == list(range(16))
    assert load_parked(store, ADAPTER) is None
    assert list(list_jobs(store, ADAPTER)) == []


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_jobs_that_waited_for_a_missing_cut_are_learned_although_the_store_fails_in_between(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Their records are committed, so no record makes the learner go on once the adapter is not parked any more."""
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(4)]
    role.run(cuts[0])
    delete_job(store, ADAPTER, 1)
    assert [role.run(job).outcome for job in cuts[2:]] == ["parked", "parked"]
    update, calls = UpdateExecutor.update, []

    def fails(self: UpdateExecutor, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == fails_at:
            raise StoreUnavailableError("the store does not answer")
        return update(self, *args)

    monkeypatch.setattr(UpdateExecutor, "update", fails)
    with pytest.raises(StoreUnavailableError):
        role.run(cuts[1])
    assert role.run(cuts[1]).outcome in {"promoted", "repeated"}  # the lane tries the same job again
    assert learned(learner) == list(range(16))
    assert list(list_jobs(store, ADAPTER)) == []
    assert load_parked(store, ADAPTER) is None


def test_a_waiting_job_that_cannot_be_worked_with_takes_no_later_job_with_it(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later job that arrived went to the dead letters in its place, and so did every one after that."""
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(3)]
    role.run(cuts[0])
    update = UpdateExecutor.update

    def fails(self: UpdateExecutor, job: UpdateRequested, alias: str) -> Any:
        if job.cut == 1:
            raise OverflowError("a number that is too large")
        return update(self, job, alias)

    monkeypatch.setattr(UpdateExecutor, "update", fails)
    assert role.run(cuts[2]).outcome == "promoted"
    assert load_given_up(store, ADAPTER) == {1: cuts[1].job_id}
    assert learned(learner) == [*range(4), *range(8, 12)]


def test_case_14_a_job_that_later_cuts_passed_is_not_taken_for_done(store: DirectoryStore) -> None:
    """Versions of a release that did not count cuts: what its head passed goes to the dead letters, not to silence."""
    learner = local_learner(store)
    first, second, third = (jobs.update(store, cut, documents(2 * cut, 2 * cut + 1)) for cut in range(3))
    learner.update(first, "live")
    learner.update(third, "live")
    with pytest.raises(JobError) as caught:
        learner.update(second, "live")
    assert caught.value.reason == "out-of-order"
    role = runner(learner)
    role.give_up(second)
    assert [(p.digests, p.refused) for p in list_pending_deletes(store, ADAPTER)] == [([second.batch.digest], True)]
    assert set(load_refused_examples(store, ADAPTER)) == {f"{n:032x}" for n in (2, 3)}


def test_a_forged_job_with_a_far_cut_neither_parks_the_adapter_nor_takes_the_cut(store: DirectoryStore) -> None:
    learner = local_learner(store)
    role = runner(learner)
    role.run(cut_of(store, 0))
    forged = jobs.update(store, 40, documents(400, 401)).model_copy(update={"job_id": "forged"})
    with pytest.raises(JobError) as caught:
        role.run(forged)
    assert caught.value.reason == "unexpected-cut"
    role.give_up(forged)
    assert load_parked(store, ADAPTER) is None
    assert load_job(store, ADAPTER, 40) is None
    assert role.run(cut_of(store, 1)).outcome == "promoted"


def test_a_cut_that_was_given_up_is_not_waited_for(store: DirectoryStore) -> None:
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(3)]
    role.run(cuts[0])
    role.give_up(cuts[1])
    assert load_given_up(store, ADAPTER) == {1: cuts[1].job_id}
    assert list(list_jobs(store, ADAPTER)) == [2]
    assert role.run(cuts[2]).outcome == "promoted"
    with pytest.raises(JobError) as caught:
        role.run(cuts[1])
    assert caught.value.reason == "given-up"


@pytest.mark.parametrize("breaks", ["body", "fields"])
def test_case_24_a_missing_cut_that_goes_to_the_dead_letters_lets_the_adapter_go_on(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """The record of the missing cut arrived and was refused: its cut is settled, and yet the adapter stayed parked."""
    learner = local_learner(store)
    sent: list[AdapterUpdate] = []
    role = runner(learner, sent)
    cuts = [cut_of(store, cut) for cut in range(4)]
    role.run(cuts[0])
    delete_job(store, ADAPTER, 1)
    for job in cuts[2:]:
        assert role.run(job).outcome == "parked"
    if breaks == "body":
        store.delete(blob_key(cuts[1].batch.digest))
    update = UpdateExecutor.update

    def fails(self: UpdateExecutor, job: UpdateRequested, alias: str) -> Any:
        if job.cut == 1 and breaks == "fields":
            raise OverflowError("a number that is too large")
        return update(self, job, alias)

    monkeypatch.setattr(UpdateExecutor, "update", fails)
    with pytest.raises(JobError) as caught:
        role.run(cuts[1])
    assert caught.value.reason == {"body": "missing-batch", "fields": "bad-job"}[breaks]
    assert load_parked(store, ADAPTER) is None
    assert load_given_up(store, ADAPTER) == {1: cuts[1].job_id}
    assert learned(learner) == [*range(4), *range(8, 16)]
    assert [event.seq for event in sent] == [2, 3]
    role.give_up(cuts[1])  # as the role does once the dead letter is sent
    with pytest.raises(JobError):
        role.run(cuts[1])  # redelivered: the process ended before it was committed
    assert learned(learner) == [*range(4), *range(8, 16)]
    assert list(list_jobs(store, ADAPTER)) == []


def test_case_24_the_operator_is_told_to_look_at_the_dead_letters_for_a_missing_cut(store: DirectoryStore) -> None:
    """A record that does not decode names no cut that could be settled; its value is what the store lacks."""
    role = runner(local_learner(store))
    cuts = [cut_of(store, cut) for cut in range(3)]
    role.run(cuts[0])
    delete_job(store, ADAPTER, 1)
    role.run(cuts[2])
    detail = load_parked(store, ADAPTER).detail
    for command in (
        f"`perennial dlq ls --topic adapter-jobs --adapter {ADAPTER}`",
        "`perennial dlq show PARTITION:OFFSET --json`",
        f"`perennial adapters unpark {ADAPTER} --without-missing`",
    ):
        assert command in detail


def never_committed(store: DirectoryStore, cut: int) -> UpdateRequested:
    """Leave in the store what a curate process leaves that ends between a cut's job and its state."""
    numbers = range(4 * cut, 4 * cut + 2)
    examples = [tiny.document(n, f"the blue parrot {n} sings at noon") for n in numbers]
    job = jobs.update(store, cut, examples).model_copy(update={"job_id": f"never committed {cut}"})
    put_job(store, ADAPTER, cut, job.model_dump_json(by_alias=True).encode())
    return job


def test_case_23_a_job_that_curate_never_committed_is_not_learned_when_the_adapter_goes_on(
    store: DirectoryStore,
) -> None:
    """Curate cuts the examples again under the same number: they were learned twice, or the second cut was refused."""
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(3)]
    role.run(cuts[0])
    delete_job(store, ADAPTER, 1)
    assert role.run(cuts[2]).outcome == "parked"
    never_committed(store, 3)
    assert role.run(cuts[1]).outcome == "promoted"
    assert load_parked(store, ADAPTER) is None
    assert learned(learner) == list(range(12))
    assert list(list_jobs(store, ADAPTER)) == [3]
    delete_job(store, ADAPTER, 3)  # curate is back
    assert role.run(cut_of(store, 3)).outcome == "promoted"
    assert learned(learner) == list(range(16))


@pytest.mark.parametrize("has_version", [False, True])
def test_case_23_a_job_that_curate_never_committed_is_not_taken_for_a_missing_cut(
    store: DirectoryStore, has_version: bool
) -> None:
    """Curate's state is older than a job that arrives: the cuts that it does not count are never taken."""
    learner = local_learner(store)
    role = runner(learner)
    first = cut_of(store, 0)
    if has_version:
        role.run(first)
    job = never_committed(store, 2)
    never_committed(store, 1)
    result = role.run(job)
    if has_version:
        assert result.outcome == "parked"
        assert "state/curate/acme/support counts 1 cuts" in load_parked(store, ADAPTER).detail
    assert not {4, 5} & set(learned(learner))


def test_a_job_is_settled_once_more_where_the_process_ended_before_it_was_deleted(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = cut_of(store, 0)
    strict = local_learner(store, min_gain_nats=50.0)

    class _CutOffError(Exception):
        """Stands for the end of the process."""

    def dies(*_: object, **__: object) -> None:
        raise _CutOffError

    with monkeypatch.context() as patched:
        patched.setattr(UpdateExecutor, "_settle", dies)
        with pytest.raises(_CutOffError):
            runner(strict).run(job)
    assert list(list_jobs(store, ADAPTER)) == [0]
    assert runner(strict).run(job).outcome == "repeated"
    assert list(list_jobs(store, ADAPTER)) == []
    assert len(load_refused_examples(store, ADAPTER)) == 4


def test_what_the_gate_refused_is_listed_until_it_is_learned(store: DirectoryStore) -> None:
    """Attack J, second half: what was accepted and not learned may be published again as it is."""
    first = cut_of(store, 0)
    runner(local_learner(store, min_gain_nats=50.0)).run(first)
    refused = load_refused_examples(store, ADAPTER)
    assert set(refused) == {f"{n:032x}" for n in range(4)}
    assert all(at > 1_700_000_000_000 for at in refused.values())
    again = [
        tiny.document(n, f"the blue parrot {n} sings at noon").model_copy(
            update={"origin": tiny.origin(100 + n), "returned": True}
        )
        for n in (0, 1)
    ]
    done = runner(local_learner(store)).run(jobs.waiting(store, jobs.update(store, 1, again)))
    assert done.outcome == "promoted"
    assert set(load_refused_examples(store, ADAPTER)) == {f"{n:032x}" for n in (2, 3)}


def test_attack_j_a_flipped_bit_parks_the_adapter_and_loses_nothing(store: DirectoryStore) -> None:
    """Attack J: one bit of the head's weights flips; others learn on; restored and unparked, all 40 are learned."""
    cuts = [cut_of(store, cut) for cut in range(10)]
    learner = local_learner(store)
    for job in cuts[:2]:
        runner(learner).run(job)
    head = learner.registry.head(ADAPTER)
    assert head is not None
    restore = flip_a_bit(store.root / blob_key(head.manifest.weights.digest))
    learner = local_learner(store)  # a restarted process: nothing is cached
    role = runner(learner)
    for job in cuts[2:6]:
        assert role.run(job).outcome == "parked"
    record = load_parked(store, ADAPTER)
    assert record is not None
    assert (record.reason, record.cut, record.job_id) == ("unreadable-object", 2, cuts[2].job_id)
    assert head.manifest.weights.digest[7:] in record.detail
    assert role.run(cut_of(store, 0, adapter="acme/other")).outcome == "promoted"
    unpark_adapter(store, ADAPTER)
    assert role.run(cuts[2]).outcome == "parked", "the cause persists"
    restore()
    unpark_adapter(store, ADAPTER)
    for job in cuts[2:]:
        assert role.run(job).outcome == "promoted"
    assert learned(learner) == list(range(40))
    assert load_refused_examples(store, ADAPTER) == {}
    assert list(list_jobs(store, ADAPTER)) == []


def broken_manifest(store: DirectoryStore, learner: LocalLearner, _: pytest.MonkeyPatch) -> Callable[[], None]:
    head = learner.registry.head(ADAPTER)
    assert head is not None
    return flip_a_bit(store.root / (manifest_key(ADAPTER, head.version) + "+"))


def newer_schema(store: DirectoryStore, learner: LocalLearner, _: pytest.MonkeyPatch) -> Callable[[], None]:
    """A release after the next wrote the head: its manifest means what this release cannot know."""
    head = learner.registry.head(ADAPTER)
    assert head is not None
    data = orjson.dumps({**orjson.loads(head.manifest.to_bytes()), "schema_version": SCHEMA_VERSION + 2})
    claim = store.root / (version_key(ADAPTER, head.seq) + "+")
    before = claim.read_bytes()
    store.put_if_absent(manifest_key(ADAPTER, digest_of(data)), data)
    claim.write_bytes(Claim(version=digest_of(data)).to_bytes())
    return lambda: claim.write_bytes(before) and None


def damaged_job(store: DirectoryStore, _: LocalLearner, __: pytest.MonkeyPatch) -> Callable[[], None]:
    return flip_a_bit(store.root / (job_key(ADAPTER, 1) + "+"))


def missing_weights(store: DirectoryStore, learner: LocalLearner, _: pytest.MonkeyPatch) -> Callable[[], None]:
    head = learner.registry.head(ADAPTER)
    assert head is not None
    path = store.root / blob_key(head.manifest.weights.digest)
    data = path.read_bytes()
    path.unlink()
    return lambda: path.write_bytes(data) and None


def out_of_memory(_: DirectoryStore, learner: LocalLearner, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def fails(*_: object, **__: object) -> None:
        raise OutOfMemoryError("one row does not fit")

    monkeypatch.setattr(type(learner.updater), "update", fails)
    return monkeypatch.undo


def lost_body(store: DirectoryStore, _: LocalLearner, __: pytest.MonkeyPatch) -> Callable[[], None]:
    digest = UpdateRequested.model_validate_json(load_job(store, ADAPTER, 1).data).batch.digest
    body = get_blob(store, digest)
    store.delete(blob_key(digest))
    return lambda: store.put_if_absent(blob_key(digest), body) and None


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (broken_manifest, "unreadable-object"), (missing_weights, "missing-object"), (out_of_memory, "out-of-memory"),
        (lost_body, "missing-object"), (newer_schema, "unreadable-object"), (damaged_job, "unreadable-object"),
    ],
)  # fmt: skip
def test_attack_j_what_is_not_the_jobs_fault_parks_the_adapter(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, breaks: Callable[..., Callable[[], None]], reason: str
) -> None:
    runner(local_learner(store)).run(cut_of(store, 0))
    job = cut_of(store, 1)
    learner = local_learner(store)
    with monkeypatch.context() as patched:
        mended = breaks(store, local_learner(store), patched)
        assert runner(learner).run(job).outcome == "parked"
        record = load_parked(store, ADAPTER)
        assert record is not None
        assert record.reason == reason
        assert "remedy: " in record.detail
        assert f"`perennial adapters unpark {ADAPTER}`" in record.detail
        mended()
    unpark_adapter(store, ADAPTER)
    assert runner(local_learner(store)).run(job).outcome == "promoted"


@pytest.mark.parametrize(("more", "reason"), [({"rank": 2}, "rank-mismatch"), ({"base_seed": 1}, "base-mismatch")])
def test_attack_j_a_worker_with_another_rank_or_base_parks_the_adapter(
    store: DirectoryStore, more: dict[str, int], reason: str
) -> None:
    runner(local_learner(store)).run(cut_of(store, 0))
    job = cut_of(store, 1)
    assert runner(local_learner(store, **more)).run(job).outcome == "parked"
    assert load_parked(store, ADAPTER).reason == reason
    assert runner(local_learner(store)).run(job).outcome == "parked", "an operator decides when it goes on"
    unpark_adapter(store, ADAPTER)
    assert runner(local_learner(store)).run(job).outcome == "promoted"


def test_a_store_without_room_parks_the_adapter_once_trying_again_did_not_help(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    role, job = runner(local_learner(store)), cut_of(store, 0)
    full = NoSpaceError("no room to write blobs", remedy="add space")
    with monkeypatch.context() as patched:
        patched.setattr(UpdateExecutor, "_publish", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(NoSpaceError) as caught:
            role.run(job)
        assert role.park(job, caught.value).outcome == "parked"
    assert load_parked(store, ADAPTER).reason == "no-space"
    unpark_adapter(store, ADAPTER)
    assert role.run(job).outcome == "promoted"


def forget(number: int) -> ForgetRequested:
    return ForgetRequested(
        job_id=f"forget {number}", request_id=f"r{number}", kind="erase", adapter=ADAPTER,
        example_ids=[f"{number:032x}"], until_ms=2_000_000_000_000,
    )  # fmt: skip


def test_a_forgetting_that_cannot_be_done_parks_the_adapter_and_is_not_reported_as_failed(
    store: DirectoryStore,
) -> None:
    learner = local_learner(store)
    role = runner(learner)
    first, second = cut_of(store, 0), cut_of(store, 1)
    for job in (first, second):
        role.run(job)
    restore = flip_a_bit(store.root / blob_key(second.batch.digest))
    done = runner(local_learner(store)).run(forget(1))
    assert done.outcome == "parked"
    assert [status.state for status in done.statuses] == ["quarantined"]
    assert load_parked(store, ADAPTER).job_id == "forget 1"
    third = cut_of(store, 2)
    assert role.run(third).outcome == "parked"
    restore()
    learner = local_learner(store)
    done = runner(learner).run(forget(1))  # retain sends it again; a parked adapter is still made to forget
    assert [status.state for status in done.statuses] == ["executed", "published"]
    assert load_parked(store, ADAPTER) is None
    assert list(list_jobs(store, ADAPTER)) == [], "the update that waited is learned"
    assert 8 in learned(learner)


def test_a_job_that_was_not_stored_waits_like_the_others(store: DirectoryStore) -> None:
    """A release that stored no jobs made it; only a micro-batch of the same adapter and cut is believed."""
    runner(local_learner(store)).run(jobs.update(store, 0, documents(0, 1)))
    other = runner(local_learner(store, rank=2))
    job = jobs.update(store, 1, documents(2, 3))
    assert other.run(job).outcome == "parked"
    assert list(list_jobs(store, ADAPTER)) == [1]
    forged = job.model_copy(update={"cut": 2})
    with pytest.raises(JobError, match="belongs to another job"):
        other.run(forged)
    assert list(list_jobs(store, ADAPTER)) == [1]


def test_a_stop_while_an_adapter_catches_up_leaves_it_parked(store: DirectoryStore) -> None:
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(4)]
    role.run(cuts[0])
    delete_job(store, ADAPTER, 1)
    for job in cuts[2:]:
        assert role.run(job).outcome == "parked"
    stops = iter([False, True, True])
    stopping = JobRunner(learner, "live", now, lambda _: None, lambda _: None, lambda: None, lambda: next(stops))
    with pytest.raises(JobInterruptedError):
        stopping.run(cuts[1])
    assert load_parked(store, ADAPTER) is not None
    assert learned(learner) == list(range(12))
    assert role.run(cuts[1]).outcome == "repeated", "its record was not committed, so it is redelivered"
    assert learned(learner) == list(range(16))
    assert load_parked(store, ADAPTER) is None


def test_case_14_what_waits_behind_a_second_missing_cut_goes_on_waiting(store: DirectoryStore) -> None:
    learner = local_learner(store)
    role = runner(learner)
    cuts = [cut_of(store, cut) for cut in range(6)]
    role.run(cuts[0])
    for cut in (1, 3):
        delete_job(store, ADAPTER, cut)
    for job in (cuts[2], cuts[4], cuts[5]):
        assert role.run(job).outcome == "parked"
    assert role.run(cuts[1]).outcome == "promoted"
    assert learned(learner) == list(range(12))
    assert load_parked(store, ADAPTER).cut == 4
    assert role.run(cuts[0]).outcome == "repeated"
    assert learned(learner) == list(range(12))
    assert role.run(cuts[3]).outcome == "promoted"
    assert learned(learner) == list(range(24))
    assert load_parked(store, ADAPTER) is None


def test_a_redelivered_job_is_not_stored_again_while_its_adapter_is_parked(store: DirectoryStore) -> None:
    job = cut_of(store, 0)
    runner(local_learner(store)).run(job)
    other = runner(local_learner(store, rank=2))
    other.run(cut_of(store, 1))
    assert other.run(job).outcome == "parked"
    assert list(list_jobs(store, ADAPTER)) == [1]


def test_parked_adapters_are_in_the_metrics(store: DirectoryStore) -> None:
    runner(local_learner(store)).run(cut_of(store, 0))
    runner(local_learner(store, rank=2)).run(cut_of(store, 1))
    metrics = Metrics("learner")

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"perennial_{name}", {"role": "learner", **labels})

    with report_parked(store, metrics):
        pass
    assert value("adapters_parked", reason="rank-mismatch") == 1
    assert value("jobs_waiting", adapter=ADAPTER) == 1
    unpark_adapter(store, ADAPTER)
    with report_parked(store, metrics):
        pass
    assert value("adapters_parked", reason="rank-mismatch") == 0
    assert value("jobs_waiting", adapter=ADAPTER) == 0
