"""Rebase jobs: equal bits to a run that was on the new base from the start, wherever they are interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from perennial.learner.forgetting.rebase_executor import RebaseExecutor
from perennial.learner.model.tokenization import ExampleError, TokenRow
from perennial.learner.roles.job_runner import JobRunner
from perennial.learner.training.update import Updater
from perennial.learner.versions.conflict_retry import MAX_CONFLICTS
from perennial.learner.versions.job_result import JobError, JobInterruptedError, JobResult
from perennial.learner.versions.version_writer import VersionWriter
from perennial.storage.errors import NoSpaceError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.keys import blob_key
from perennial.storage.recovery.rollback import RollbackError, version_before
from perennial.storage.registry.history.rebuilt_steps import rebases_under_way
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.parked import ParkedAdapter, load_parked, park_adapter
from perennial.storage.registry.quarantine import LegalHold, ensure_text_key, update_quarantine
from perennial.storage.registry.refused_examples import load_refused_examples
from perennial.storage.registry.waiting_jobs import list_jobs
from perennial.streams.events.adapter_events import AdapterPromoted, AdapterUpdate
from perennial.streams.events.models import ExampleAccepted, RebaseRequested, RollbackRequested
from perennial.streams.retention.quarantine_filter import text_hash
from tests import jobs
from tests.local_learner import LocalLearner, trained_cuts
from tests.oracle import read_adapter
from tests.unit.learner.test_forgetting import (
    CutOffError,
    documents,
    erase,
    forget,
    head,
    learn,
    never_saw,
    quarantined,
    readable,
)
from tests.unit.learner.test_versions import ADAPTER, local_learner, now

OLD, NEW = 0, 1
"""Seeds of the two bases."""


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


def job(name: str = "b1", **more: Any) -> RebaseRequested:
    return RebaseRequested(job_id=f"rebase-{name}", adapter=ADAPTER, requested_by="test", **more)


def rebase(
    learner: LocalLearner, wanted: RebaseRequested | None = None, failpoint: Callable[[str], None] = lambda _: None
) -> JobResult:
    return RebaseExecutor(learner, now, failpoint).rebase(wanted or job(), "live")


def runner(learner: LocalLearner, sent: list[AdapterUpdate] | None = None) -> JobRunner:
    return JobRunner(learner, "live", now, lambda _: None, ([] if sent is None else sent).append, lambda: None)


def test_a_rebase_gives_the_bits_of_a_run_on_the_new_base(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 20)
    learned = [done.manifest for done in learn(local_learner(store, OLD), cuts)]
    learner = local_learner(store, NEW)
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts).equals(done.manifest)
    made, old = done.manifest, learned[-1]
    assert old is not None
    assert (made.kind, made.outcome, made.seq) == ("rebase", "promoted", old.seq + 1)
    assert made.head == old.digest(), "it names the version that it is a rebase of"
    assert (made.base_sha256, old.base_sha256) == (learner.base.digest, "sha256:" + old.base_sha256[7:])
    assert made.base_sha256 != old.base_sha256
    assert (made.marks, made.next_cut) == (old.marks, old.next_cut)
    assert "20 of 20 examples learned" in made.reason
    assert isinstance(done.event, AdapterPromoted)
    assert done.event.base.sha256 == learner.base.digest
    state = learner.registry.alias(ADAPTER)
    assert state is not None
    assert (state.version, state.generation) == (made.digest(), len(cuts) + 1)
    assert store.exists(blob_key(old.weights.digest)), "replicas on the old base serve it still"
    assert rebases_under_way(store) == {}
    record = read_adapter(learner.registry, ADAPTER)
    assert (len(record.learned), record.learned_twice()) == (20, [])


def test_updates_after_a_rebase_go_on_from_it(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 24)
    learn(local_learner(store, OLD), dict(list(cuts.items())[:5]))
    learner = local_learner(store, NEW)
    rebase(learner)
    learn(learner, {5: cuts[5]})
    assert never_saw(learner, tmp_path, cuts).equals(head(learner.registry))


@pytest.mark.parametrize("emergency", [False, True])
def test_an_example_of_before_the_rebase_is_forgotten_after_it(
    store: DirectoryStore, tmp_path: Path, emergency: bool
) -> None:
    """The rebuild starts from the rebase's own schedule, on the new base; the versions on the old one go."""
    cuts = documents(1, 20)
    old = [done.manifest for done in learn(local_learner(store, OLD), cuts)]
    learner = local_learner(store, NEW)
    rebase(learner)
    done, _ = forget(learner, quarantined(store, erase("r1", 9, emergency=emergency)))
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {9}).equals(done.manifest)
    assert (done.manifest.kind, done.manifest.base_sha256) == ("forget", learner.base.digest)
    assert [(s.state, s.examples) for s in done.statuses] == [("executed", 1), ("published", 1)]
    assert readable(store.root, ["secret009"]) == []
    revoked = {revocation.version for revocation in learner.registry.revocations(ADAPTER)}
    assert {manifest.digest() for manifest in old[2:] if manifest} < revoked
    for manifest in old[2:]:
        assert manifest is not None
        assert not store.exists(blob_key(manifest.weights.digest))


def test_what_was_erased_before_the_rebase_stays_erased(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 20)
    before = local_learner(store, OLD)
    learn(before, cuts)
    forget(before, quarantined(store, erase("r1", 9)))
    learner = local_learner(store, NEW)
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {9}).equals(done.manifest)
    assert readable(store.root, ["secret009"]) == []


def test_what_is_accepted_for_forgetting_is_not_learned_anew(store: DirectoryStore, tmp_path: Path) -> None:
    """The request was accepted while the learner of the old base was gone; its job comes after the rebase."""
    cuts = documents(1, 20)
    learn(local_learner(store, OLD), cuts)
    request = quarantined(store, erase("r1", 9))
    learner = local_learner(store, NEW)
    with pytest.raises(JobError) as raised:
        forget(learner, request)
    assert raised.value.reason == "base-mismatch"
    done = rebase(learner)
    assert done.manifest is not None
    oracle = never_saw(learner, tmp_path, cuts, {9})
    assert oracle.equals(done.manifest)
    forgotten, _ = forget(learner, request)
    assert [(s.state, s.examples) for s in forgotten.statuses] == [("executed", 1), ("published", 1)]
    assert forgotten.completion is not None
    assert done.event is not None
    outcome = forgotten.completion.outcomes["r1"]
    assert (outcome.version, outcome.generation) == (done.manifest.digest(), done.event.generation), (
        "replicas that may still serve the old versions are asked"
    )
    assert oracle.equals(head(learner.registry))
    assert readable(store.root, ["secret009"]) == []


@pytest.mark.parametrize("held", [False, True])
def test_a_text_that_was_erased_elsewhere_is_learned_anew_only_under_a_hold(
    store: DirectoryStore, tmp_path: Path, held: bool
) -> None:
    cuts = documents(1, 12)
    learn(local_learner(store, OLD), cuts)
    suppressed = text_hash(cuts[1][1], ensure_text_key(store, ADAPTER))
    assert suppressed is not None
    holds = [LegalHold(request_id="h1", selector={"document_ids": ["doc-5"]})] if held else []
    update_quarantine(store, ADAPTER, lambda found: found.suppressing({suppressed}).with_holds(holds))
    learner = local_learner(store, NEW)
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, set() if held else {5}).equals(done.manifest)


def test_an_example_that_is_to_be_forgotten_meanwhile_is_left_out(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 20)
    learn(local_learner(store, OLD), cuts)
    learner = local_learner(store, NEW)
    steps = 0

    def accept(name: str) -> None:
        nonlocal steps
        steps += name == "learner.forget_step"
        if steps == 4 and name == "learner.forget_step":
            quarantined(store, erase("r1", 9))

    done = rebase(learner, failpoint=accept)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {9}).equals(done.manifest)
    assert steps == 5 + 3, "the updates before the example are not learned again"


def test_a_rebase_begins_again_for_as_many_requests_as_come_meanwhile(store: DirectoryStore, tmp_path: Path) -> None:
    """Other writers' conflicts are limited in number; a request to forget is none."""
    cuts = documents(1, MAX_CONFLICTS + 5, per_cut=MAX_CONFLICTS + 5)
    learn(local_learner(store, OLD), cuts)
    learner = local_learner(store, NEW)
    asked: list[int] = []

    def accept(name: str) -> None:
        if name == "learner.forget_step" and len(asked) <= MAX_CONFLICTS:
            asked.append(len(asked))
            quarantined(store, erase(f"r{asked[-1]}", asked[-1]))

    done = rebase(learner, failpoint=accept)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, asked).equals(done.manifest)
    assert len(asked) == MAX_CONFLICTS + 1


@pytest.mark.parametrize("at", ["learner.forget_trained", "learner.forget_step"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_rebase_goes_on_where_it_was_cut_off(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, step: int
) -> None:
    cuts = documents(1, 20)
    learn(local_learner(store, OLD), cuts)
    before = local_learner(store, OLD).registry.alias(ADAPTER)
    reached = 0

    def cut_off(name: str) -> None:
        nonlocal reached
        reached += name == at
        if reached == step:
            raise CutOffError

    with pytest.raises(CutOffError):
        rebase(local_learner(store, NEW), failpoint=cut_off)
    learner = local_learner(store, NEW)
    assert learner.registry.alias(ADAPTER) == before, "the old version is live"
    kept = step if at == "learner.forget_step" else step - 1
    under_way = rebases_under_way(store).get(ADAPTER)
    assert (under_way and tuple(under_way)) == (("rebase-b1", kept, 5) if kept else None)
    cuts_trained = trained_cuts(monkeypatch)
    done = rebase(learner)
    assert cuts_trained == list(cuts)[kept:]
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts).equals(done.manifest)


@pytest.mark.parametrize(
    "at", ["publish.verify", "publish.manifest", "publish.claim_update", "publish.claim_seq", "publish.alias"]
)
def test_a_rebase_that_is_cut_off_while_it_is_published_is_published_once(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    cuts = documents(1, 12)
    learn(local_learner(store, OLD), cuts)

    def cut_off(name: str) -> None:
        if name == at:
            raise CutOffError

    with pytest.raises(CutOffError):
        rebase(local_learner(store, NEW, failpoint=cut_off))
    learner = local_learner(store, NEW)
    cuts_trained = trained_cuts(monkeypatch)
    done = rebase(learner)
    assert cuts_trained == []
    assert done.event is not None
    assert done.event.generation == len(cuts) + 1
    made = head(learner.registry)
    assert (made.kind, made.seq) == ("rebase", len(cuts) + 1)
    assert never_saw(learner, tmp_path, cuts).equals(made)
    assert rebases_under_way(store) == {}


def test_a_stop_ends_a_rebase_between_two_updates(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = documents(1, 12)
    learn(local_learner(store, OLD), cuts)
    cuts_trained = trained_cuts(monkeypatch)
    executor = RebaseExecutor(
        local_learner(store, NEW), now, lambda _: None, should_stop=lambda: len(cuts_trained) == 2
    )
    with pytest.raises(JobInterruptedError):
        executor.rebase(job(), "live")
    assert rebase(local_learner(store, NEW)).outcome == "promoted"
    assert cuts_trained == [0, 1, 2]


def test_the_old_version_stays_live_where_the_new_one_does_not_pass_the_gate(store: DirectoryStore) -> None:
    cuts = documents(1, 12)
    learn(local_learner(store, OLD), cuts)
    strict = local_learner(store, NEW, min_gain_nats=40)
    before = strict.registry.alias(ADAPTER)
    role = runner(strict)
    waiting = jobs.waiting(store, jobs.update(store, 3, documents(2, 16)[3]))
    assert role.run(waiting).outcome == "parked"
    assert role.run(job()).outcome == "parked"
    parked = load_parked(store, ADAPTER)
    assert parked is not None
    assert (parked.reason, parked.job_id) == ("rebase-refused", "rebase-b1")
    assert "0 of 12 examples" in parked.detail
    assert f"`perennial adapters rebase {ADAPTER}`" in parked.detail
    assert strict.registry.alias(ADAPTER) == before
    assert head(strict.registry).kind == "update"
    assert list(list_jobs(store, ADAPTER)) == [3]
    # With limits that fit the new base it passes, and what waited is learned.
    sent: list[AdapterUpdate] = []
    role = runner(local_learner(store, NEW), sent)
    assert role.run(job("b2")).outcome == "promoted"
    assert load_parked(store, ADAPTER) is None
    assert (list(list_jobs(store, ADAPTER)), [event.seq for event in sent]) == ([], [4, 5])


def test_a_rebase_that_failed_ends_with_the_next_that_succeeds(store: DirectoryStore) -> None:
    cuts = documents(1, 8)
    learn(local_learner(store, OLD), {0: cuts[0]})
    role = runner(local_learner(store, NEW))
    assert role.run(jobs.waiting(store, jobs.update(store, 1, cuts[1]))).outcome == "parked"
    role.park(job("b1"), NoSpaceError("full"))
    parked = load_parked(store, ADAPTER)
    assert parked is not None
    assert (parked.reason, parked.job_id) == ("no-space", "rebase-b1")
    assert role.run(job("b2")).outcome == "promoted"
    assert load_parked(store, ADAPTER) is None
    assert list(list_jobs(store, ADAPTER)) == [], "what waited is learned"


def test_an_adapter_that_an_operator_parked_stays_parked(store: DirectoryStore) -> None:
    learn(local_learner(store, OLD), documents(1, 4))
    parked = park_adapter(store, ParkedAdapter(adapter=ADAPTER, reason="operator", since=now()))
    assert runner(local_learner(store, NEW, min_gain_nats=40)).run(job("b1")).outcome == "parked"
    assert load_parked(store, ADAPTER) == parked, "a refused rebase does not take the operator's place"
    assert runner(local_learner(store, NEW)).run(job("b2")).outcome == "promoted"
    assert load_parked(store, ADAPTER) == parked


def test_an_adapter_that_waits_for_its_base_is_learned_anew_and_goes_on(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 20)
    learn(local_learner(store, OLD), dict(list(cuts.items())[:3]))
    sent: list[AdapterUpdate] = []
    learner = local_learner(store, NEW)
    role = runner(learner, sent)
    for cut in (3, 4):
        waiting = jobs.waiting(store, jobs.update(store, cut, cuts[cut]))
        assert role.run(waiting).outcome == "parked"
    parked = load_parked(store, ADAPTER)
    assert parked is not None
    assert parked.reason == "base-mismatch"
    assert "`perennial adapters rebase ADAPTER`" in parked.detail
    done = role.run(job())
    assert done.outcome == "promoted"
    assert load_parked(store, ADAPTER) is None
    assert [event.seq for event in sent] == [4, 5, 6]
    assert never_saw(learner, tmp_path, cuts).equals(head(learner.registry))
    again = role.run(job())  # delivered again
    assert again.outcome == "repeated"
    assert head(learner.registry).seq == 6


def test_another_rank_is_a_rebase_too(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 12)
    learn(local_learner(store, OLD), cuts)
    learner = local_learner(store, OLD, rank=8, alpha=16)
    done = rebase(learner)
    assert done.manifest is not None
    assert (done.manifest.rank, done.manifest.config["alpha"]) == (8, 16)
    assert never_saw(learner, tmp_path, cuts).equals(done.manifest)


def test_another_alpha_parks_the_adapter_until_a_rebase(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 8)
    old = learn(local_learner(store, OLD, alpha=8), {0: cuts[0]})[0].manifest
    assert old is not None
    learner = local_learner(store, OLD, alpha=16)
    role = runner(learner)
    assert role.run(jobs.waiting(store, jobs.update(store, 1, cuts[1]))).outcome == "parked"
    parked = load_parked(store, ADAPTER)
    assert parked is not None
    assert parked.reason == "alpha-mismatch"
    assert "got: 16; allowed: 8" in parked.detail
    assert "PERENNIAL_ALPHA" in parked.detail
    assert role.run(job()).outcome == "promoted"
    assert load_parked(store, ADAPTER) is None
    assert never_saw(learner, tmp_path, cuts).equals(head(learner.registry))
    with pytest.raises(JobError) as raised:
        learner.rollback(RollbackRequested(job_id="back", adapter=ADAPTER, version=old.digest(), requested_by="test"))
    assert raised.value.reason == "alpha-mismatch"
    made = learner.registry.version_of_job(ADAPTER, "rebase-b1")
    assert made is not None
    with pytest.raises(RollbackError) as refused:
        version_before(learner.registry, ADAPTER, made[0])
    assert refused.value.reason == "nothing-to-roll-back-to"


def test_updates_of_two_alphas_are_all_learned_anew(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As releases made them that did not compare it: the newest version alone has this learner's alpha."""
    cuts = documents(1, 8)
    learn(local_learner(store, OLD, alpha=8), {0: cuts[0]})
    learner = local_learner(store, OLD, alpha=16)
    with monkeypatch.context() as earlier:
        earlier.setattr(VersionWriter, "check_base", lambda *_: None)
        learn(learner, {1: cuts[1]})
    assert head(learner.registry).config["alpha"] == 16
    done = rebase(learner)
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts).equals(done.manifest)
    assert rebase(learner, job("b2")).outcome == "unchanged"
    forgotten, _ = forget(learner, quarantined(store, erase("r1", 1)))
    assert forgotten.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {1}).equals(forgotten.manifest)


def test_an_adapter_on_this_base_is_left_as_it_is(store: DirectoryStore) -> None:
    learner = local_learner(store, OLD)
    assert rebase(learner).outcome == "unchanged", "no version"
    learn(learner, documents(1, 4))
    before = learner.registry.alias(ADAPTER)
    assert rebase(learner).outcome == "unchanged"
    assert runner(learner).run(job()).outcome == "unchanged"
    assert learner.registry.alias(ADAPTER) == before
    assert learner.version_of_job(ADAPTER, "rebase-b1") is not None, "whoever waits for the job learns of it"
    parked = ParkedAdapter(adapter=ADAPTER, reason="recipe-mismatch", since=now())
    park_adapter(store, parked)
    assert runner(learner).run(job("b2")).outcome == "unchanged"
    assert load_parked(store, ADAPTER) == parked, "what a forgetting waits for is still so"


@pytest.mark.parametrize("base", [NEW, OLD])
def test_a_job_that_had_nothing_to_do_has_nothing_to_do_again(store: DirectoryStore, base: int) -> None:
    learn(local_learner(store, OLD), documents(1, 4))
    rebase(local_learner(store, NEW))
    made = head(local_learner(store, NEW).registry)
    assert rebase(local_learner(store, NEW), job("b2")).outcome == "unchanged"
    parked = ParkedAdapter(adapter=ADAPTER, reason="base-mismatch", since=now())
    park_adapter(store, parked)
    assert runner(local_learner(store, base)).run(job("b2")).outcome == "unchanged", "delivered again"
    assert load_parked(store, ADAPTER) == parked
    assert head(local_learner(store, NEW).registry) == made


def test_an_adapter_of_which_nothing_passed_goes_on_from_the_initial_state(
    store: DirectoryStore, tmp_path: Path
) -> None:
    cuts = documents(1, 8)
    refused = learn(local_learner(store, OLD, min_gain_nats=40), {0: cuts[0]})
    assert [done.outcome for done in refused] == ["refused"]
    learner = local_learner(store, NEW, min_gain_nats=40)
    done = rebase(learner)
    assert done.manifest is not None
    assert (done.outcome, done.event, done.manifest.base_sha256) == ("unchanged", None, learner.base.digest)
    assert {item.reason for item in head(learner.registry).skipped} == set()
    assert len(read_adapter(learner.registry, ADAPTER).skipped) == 4
    learner = local_learner(store, NEW)
    learn(learner, {1: cuts[1]})
    assert never_saw(learner, tmp_path, {1: cuts[1]}).equals(head(learner.registry))


def without_text_of(learner: LocalLearner, number: int) -> LocalLearner:
    """Return a learner whose tokenizer finds nothing to train in a document."""

    class BlindUpdater(Updater):
        def rows(self, example: ExampleAccepted) -> list[TokenRow]:
            if example.document_id == f"doc-{number}":
                raise ExampleError("nothing to train")
            return super().rows(example)

    parts = {part.name: getattr(learner.updater, part.name) for part in fields(Updater)}
    return LocalLearner(
        learner.registry, BlindUpdater(**parts), learner.base, threads=1, now=now, failpoint=lambda _: None
    )


def test_an_example_without_text_on_a_base_is_not_lost(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 16)
    learn(local_learner(store, OLD), cuts)
    lost = cuts[1][1].example_id
    learner = without_text_of(local_learner(store, NEW), 5)
    done = rebase(learner)
    assert done.manifest is not None
    assert "15 of 16 examples learned" in done.manifest.reason
    assert list(read_adapter(learner.registry, ADAPTER).skipped.values()) == ["no-text-on-base"]
    assert lost in load_refused_examples(store, ADAPTER), "it may be published again"
    forgotten, _ = forget(learner, quarantined(store, erase("r1", 6)))
    assert forgotten.outcome == "promoted"
    record = read_adapter(learner.registry, ADAPTER)
    assert (len(record.learned), list(record.skipped.values())) == (14, ["no-text-on-base"])
    back = local_learner(store, OLD)
    made = rebase(back, job("b2")).manifest
    assert made is not None
    assert never_saw(back, tmp_path, cuts, {6}).equals(made)
    assert lost not in load_refused_examples(store, ADAPTER)


def test_two_rebases_lead_back_to_the_first_base(store: DirectoryStore, tmp_path: Path) -> None:
    cuts = documents(1, 12)
    first = local_learner(store, OLD)
    learn(first, cuts)
    rebase(local_learner(store, NEW))
    back = local_learner(store, OLD)
    done = rebase(back, job("b2"))
    assert done.manifest is not None
    assert never_saw(back, tmp_path, cuts).equals(done.manifest)


def test_a_rollback_does_not_return_to_the_old_base(store: DirectoryStore) -> None:
    learn(local_learner(store, OLD), documents(1, 8))
    old = head(local_learner(store, OLD).registry).digest()
    learner = local_learner(store, NEW)
    made = rebase(learner).manifest
    assert made is not None
    with pytest.raises(RollbackError) as raised:
        version_before(learner.registry, ADAPTER, made.digest())
    assert raised.value.reason == "nothing-to-roll-back-to"
    back = RollbackRequested(job_id="back", adapter=ADAPTER, version=old, requested_by="test")
    with pytest.raises(JobError) as refused:
        learner.rollback(back)
    assert refused.value.reason == "base-mismatch"
    revoked = RollbackRequested(job_id="off", adapter=ADAPTER, version=made.digest(), requested_by="t", revoke=True)
    learner.rollback(revoked)
    state = learner.registry.alias(ADAPTER)
    assert state is not None
    assert state.kind == "retired", "no version of this base is left"


def test_another_job_of_the_adapter_makes_a_rebase_begin_again(store: DirectoryStore, tmp_path: Path) -> None:
    """Two groups: a learner of the old base learns a cut while the new one rebases."""
    cuts = documents(1, 12)
    old = local_learner(store, OLD)
    learn(old, {0: cuts[0], 1: cuts[1]})
    late: dict[int, list[ExampleAccepted]] = {2: cuts[2]}

    def learned_meanwhile(name: str) -> None:
        if name == "learner.forget_step" and late:
            learn(old, {cut: late.pop(cut) for cut in list(late)})

    learner = local_learner(store, NEW)
    done = rebase(learner, failpoint=learned_meanwhile)
    manifest: Manifest | None = done.manifest
    assert manifest is not None
    assert manifest.seq == 4
    assert never_saw(learner, tmp_path, cuts).equals(manifest)
