"""The manifest says which shared adapter a personal one extends, in whatever way its version was made."""

from __future__ import annotations

from pathlib import Path

from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.manifest import Manifest
from perennial.streams.events.models import RollbackRequested
from perennial.streams.settings import Settings
from tests import tiny
from tests.local_learner import LocalLearner
from tests.unit.learner.test_forgetting import documents, erase, forget, head, learn, quarantined
from tests.unit.learner.test_rebase import NEW, OLD, rebase
from tests.unit.learner.test_versions import ADAPTER, local_learner

SHARED = ADAPTER.rpartition("/")[0]


def extending(store: DirectoryStore, base: int = OLD) -> LocalLearner:
    """Return a learner as PERENNIAL_SHARED_ADAPTERS makes it."""
    learner = local_learner(store, base)
    settings = Settings.of(shared_adapters=SHARED, env_file=None)
    learner.extended_by = settings.tenants.extended_by
    return learner


def learned(store: DirectoryStore) -> tuple[LocalLearner, list[Manifest]]:
    learner = extending(store)
    return learner, [done.manifest for done in learn(learner, documents(1, 12)) if done.manifest is not None]


def test_the_setting_reaches_the_writer(tmp_path: Path) -> None:
    settings = Settings.of(shared_adapters=SHARED, store=str(tmp_path / "store"), env_file=None)
    writer = make_version_writer(settings, DirectoryStore(tmp_path / "store", fsync=False), tiny.base())
    assert (writer.extended_by(ADAPTER), writer.extended_by(SHARED)) == (SHARED, None)


def test_updates_name_what_the_adapter_extends_and_so_do_their_events(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store", fsync=False)
    learner, made = learned(store)
    assert [manifest.extends for manifest in made] == [SHARED] * 3
    (done,) = learn(learner, {3: documents(2, 16)[3]})
    assert done.event is not None
    assert done.event.extends == SHARED
    plain = local_learner(DirectoryStore(tmp_path / "plain", fsync=False))
    assert [done.manifest.extends for done in learn(plain, documents(1, 4)) if done.manifest] == [None]


def test_a_rollback_keeps_it(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store", fsync=False)
    learner, made = learned(store)
    job = RollbackRequested(
        job_id="r1",
        adapter=ADAPTER,
        version=made[0].digest(),
        live=made[-1].digest(),
        requested_by="ann",
        reason="worse",
    )
    done = learner.rollback(job)
    assert (head(learner.registry).kind, head(learner.registry).extends) == ("rollback", SHARED)
    assert done.event is not None
    assert done.event.extends == SHARED


def test_a_rebuild_keeps_it(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store", fsync=False)
    learner, _ = learned(store)
    done, _ = forget(learner, quarantined(store, erase("r1", 1)))
    assert done.manifest is not None
    assert (done.manifest.kind, done.manifest.extends) == ("forget", SHARED)
    assert head(learner.registry).extends == SHARED


def test_a_rebase_keeps_it(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store", fsync=False)
    learned(store)
    done = rebase(extending(store, NEW))
    assert done.manifest is not None
    assert (done.manifest.kind, done.manifest.extends) == ("rebase", SHARED)
