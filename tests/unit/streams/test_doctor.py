"""What `perennial doctor` says about durability and the recorded topics."""

from __future__ import annotations

import pytest

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.cli import doctor
from perennial.streams.kafka import topics
from perennial.streams.kafka.installation import record_found
from perennial.streams.kafka.topics import TOPICS, ClusterIds
from perennial.streams.settings import Settings

GOOD = {"min.insync.replicas": "2", "unclean.leader.election.enable": "false"}


@pytest.mark.parametrize(
    ("replicas", "configs", "says"),
    [
        (3, GOOD, None),
        (2, GOOD, "replication factor 2, should be 3"),
        (3, {**GOOD, "min.insync.replicas": "1"}, "min.insync.replicas is 1, should be 2"),
        (3, {**GOOD, "unclean.leader.election.enable": "true"}, "unclean.leader.election.enable is not false"),
    ],
)
def test_attack_k_a_cluster_that_may_lose_what_it_acknowledged_fails(replicas, configs, says):
    """Attack K: an unclean leader election or a single copy takes records that the marks have counted."""
    finding = doctor.durability_of({"examples": replicas}, {"examples": configs})
    assert finding.ok is (says is None)
    assert says is None or says in finding.found


@pytest.fixture
def settings(tmp_path):
    return Settings.of(kafka="127.0.0.1:1", store=str(tmp_path), env_file=None)


def found(counts=None):
    return ClusterIds(
        "c", {name: f"id-{name}" for name in TOPICS}, {name: (counts or {}).get(name, 4) for name in TOPICS}
    )


def test_case_14_the_doctor_names_the_topic_with_other_partitions(settings, tmp_path, monkeypatch):
    """Case 14: partitions were added by hand; the count showed as a mere difference from the settings."""
    check = doctor.CHECKS["recorded topics"]
    monkeypatch.setattr(topics, "identify", lambda *_: found())
    assert "nothing is recorded yet" in check(settings).found
    record_found(settings, DirectoryStore(tmp_path), found(), TOPICS)
    assert check(settings).ok
    monkeypatch.setattr(topics, "identify", lambda *_: found({"adapter-jobs": 32}))
    finding = check(settings)
    assert not finding.ok
    assert "got 32 partitions, recorded 4 partitions" in finding.found
    assert "perennial topics repartition adapter-jobs --partitions 32" in finding.remedy
