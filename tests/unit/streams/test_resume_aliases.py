"""Restored aliases are put back, and signed, only where a trusted key signed them; and not without a key to sign with."""

from __future__ import annotations

from pathlib import Path

import pytest

from perennial.learner.versions.alias_events import alias_event, alias_event_id
from perennial.storage.registry.registry import AliasState
from perennial.storage.signing.trust import Trust
from perennial.streams.recovery.announced import Announced
from perennial.streams.recovery.reconcile import (
    EventMaker,
    ReconcileError,
    ReconcileReport,
    require_signing_key,
    resume_aliases,
)
from perennial.streams.settings import Settings
from tests.keys import Keys
from tests.memory_store import MemoryStore
from tests.versions import VersionPublisher

MAKER = EventMaker(alias_event, alias_event_id)


class Sink:
    """Takes the place of the producer: no broker is needed to see what reaches the store."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, event: object, **_: object) -> None:
        self.sent.append(f"{event.adapter}@{event.generation}")

    def flush(self) -> None:
        pass


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


def restored_store(*adapters: str, trust: Trust) -> tuple[MemoryStore, dict[str, bytes]]:
    """A store whose aliases wait for their reconciliation, and these by adapter."""
    store, aliases = MemoryStore(), {}
    for adapter in adapters:
        VersionPublisher(store, adapter, trust=trust).publish()
        aliases[adapter] = store.get(f"aliases/{adapter}/live").data
        store.delete(f"aliases/{adapter}/live")
        stage(store, adapter, aliases[adapter])
    return store, aliases


def stage(store: MemoryStore, adapter: str, data: bytes) -> None:
    store.delete(f"restored/aliases/{adapter}/live")
    store.put_if_absent(f"restored/aliases/{adapter}/live", data)


def resumed(store: MemoryStore, keys: Keys, announced: Announced | None = None) -> tuple[ReconcileReport, list[str]]:
    report, sink = ReconcileReport(), Sink()
    settings = Settings.of(env_file=None, signing_key_file=str(keys.private), trusted_keys=str(keys.public))
    resume_aliases(settings, store, announced or Announced(), MAKER, sink, report, lambda _: None)
    return report, sink.sent


def test_an_alias_of_a_backup_that_no_trusted_key_signed_is_not_put_back(keys: Keys) -> None:
    store, aliases = restored_store("changed", "good", "other", "torn", "unsigned", trust=keys.owner)
    changed = aliases["changed"].replace(b'"generation":1', b'"generation":7')
    assert changed != aliases["changed"]
    bare = AliasState.model_validate_json(aliases["unsigned"])
    assert bare.signature is not None
    stage(store, "changed", changed)
    stage(store, "other", aliases["good"])
    stage(store, "torn", b"{")
    stage(store, "unsigned", bare.signed(Trust()).to_bytes())
    announced = Announced()
    announced.note("changed", "live", 4)
    report, sent = resumed(store, keys, announced)
    assert (list(report.resumed), sent) == (["good#live"], ["good@1"])
    wanted = {"changed": "does not fit", "other": "another alias", "torn": "does not hold", "unsigned": "not signed"}
    assert report.refused.keys() == {f"restored/aliases/{each}/live" for each in wanted}
    assert all(said in report.refused[f"restored/aliases/{each}/live"] for each, said in wanted.items())
    assert list(store.list("aliases/")) == ["aliases/good/live"]
    assert report.floors == {"changed#live": 4}, "a learner begins above what was announced"


def test_a_signed_alias_is_put_back_with_a_signature(keys: Keys) -> None:
    store, _ = restored_store("good", trust=keys.owner)
    report, _ = resumed(store, keys)
    assert report.refused == {}
    registry = VersionPublisher(store, "good", trust=keys.readers).registry
    assert registry.alias("good").generation == 1
    assert list(store.list("restored/")) == []


@pytest.mark.parametrize("is_staged", [True, False])
def test_without_a_key_no_signed_alias_is_written(keys: Keys, *, is_staged: bool) -> None:
    store, aliases = restored_store("good", trust=keys.owner)
    if not is_staged:
        store.put_if_absent("aliases/good/live", aliases["good"])
        store.delete("restored/aliases/good/live")
    for trust in (Trust(), keys.readers):
        with pytest.raises(ReconcileError, match="aliases of this store are signed") as raised:
            require_signing_key(store, trust)
        assert "PERENNIAL_SIGNING_KEY_FILE" in raised.value.remedy
    require_signing_key(store, keys.owner)


def test_without_a_key_unsigned_aliases_need_none() -> None:
    store, _ = restored_store("plain", trust=Trust())
    stage(store, "torn", b"{")
    require_signing_key(store, Trust())
