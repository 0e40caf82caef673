"""Topics on a real broker: created once, never altered, and differences are reported."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest
from kafka.admin import KafkaAdminClient

from perennial.streams.kafka.topics import TOPICS, TopicError, identify, provision
from perennial.streams.settings import Settings
from tests.integration.streams.topic_kit import create_again


@pytest.fixture
def settings(broker, topic_prefix):
    return Settings.of(kafka=broker.bootstrap, topic_prefix=topic_prefix, partitions=3, env_file=None)


def test_missing_topics_are_created_with_their_configs(settings):
    dry = provision(settings, dry_run=True)
    assert [report.created for report in dry] == [True] * len(TOPICS)

    first = provision(settings)
    assert {report.name for report in first} == {settings.kafka.topic(name) for name in TOPICS}
    assert all(report.created for report in first)

    second = provision(settings)
    assert [(report.created, report.differences) for report in second] == [(False, ())] * len(TOPICS)


def test_differences_are_reported_and_not_altered(settings):
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap)
    name = settings.kafka.topic("adapter-updates")
    admin.create_topics({name: {"num_partitions": 2, "replication_factor": 1, "configs": {"cleanup.policy": "delete"}}})
    admin.close()

    for _ in range(2):
        reports = {report.name: report for report in provision(settings)}
        assert not reports[name].created
        assert "partitions is 2, should be 3" in reports[name].differences
        assert "cleanup.policy is delete, should be compact" in reports[name].differences


def test_a_recreated_topic_has_another_id(settings):
    provision(settings)
    before = identify(settings, ["documents"])
    assert before == identify(settings, ["documents"])
    assert set(identify(settings).topic_ids) == {settings.kafka.topic(name) for name in TOPICS}

    name = settings.kafka.topic("documents")
    create_again(settings, "documents", 1)
    after = identify(settings, ["documents"])
    assert after.cluster_id == before.cluster_id
    assert after.topic_ids[name] != before.topic_ids[name]
    assert uuid.UUID(after.topic_ids[name])


def test_a_missing_topic_is_named_in_the_error(settings):
    with pytest.raises(TopicError, match="documents") as error:
        identify(settings, ["documents"])
    assert "perennial topics create" in error.value.remedy


def test_an_unreachable_broker_raises_kafka_unavailable():
    program = (
        "from perennial.streams.kafka import topics; from perennial.streams.settings import Settings\n"
        "topics.BOOTSTRAP_TIMEOUT_MS = 500\n"
        "try: topics.provision(Settings.of(kafka='127.0.0.1:9'))\n"
        "except topics.KafkaUnavailableError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "127.0.0.1:9" in done.stdout
    assert "remedy: " in done.stdout
