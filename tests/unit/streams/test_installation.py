"""The installation record: created once, compared by every role, changed by the two commands only."""

from __future__ import annotations

import threading

import pytest

from perennial.storage.errors import IntegrityError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams.kafka.installation import (
    INPUT_TOPICS,
    KEY,
    LATEST_TOPICS,
    ORDERED_TOPICS,
    InstallationError,
    add_input_topic_id,
    adopt_topics,
    load_installation,
    record_found,
    record_partitions,
    require_recorded_tenants,
)
from perennial.streams.kafka.topics import TOPICS, ClusterIds
from perennial.streams.settings import Settings

SETTINGS = Settings.of(topic_prefix="x-", env_file=None)


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path)


def broker(cluster="c1", ids=None, counts=None):
    full = {name: SETTINGS.kafka.topic(name) for name in TOPICS}
    return ClusterIds(
        cluster,
        {full[name]: (ids or {}).get(name, f"id-{name}") for name in TOPICS},
        {full[name]: (counts or {}).get(name, 4) for name in TOPICS},
    )


def check(store, found, names=tuple(TOPICS), allowed=None, by_reader=False):
    return record_found(SETTINGS, store, found, names, allowed, by_reader=by_reader)


def test_every_topic_has_a_rule():
    assert {*INPUT_TOPICS, *ORDERED_TOPICS, *LATEST_TOPICS, "dead-letters"} == set(TOPICS)


def test_the_first_role_records_and_the_next_agrees(store):
    assert load_installation(store) is None
    first = check(store, broker(), ["examples", "documents"])
    assert first == load_installation(store)
    assert first.cluster_id == "c1"
    assert first.topics.keys() == {"examples", "documents"}
    second = check(store, broker())
    assert second.topics.keys() == set(TOPICS)
    assert second.partitions() == dict.fromkeys((*ORDERED_TOPICS, *LATEST_TOPICS), 4)


def test_roles_that_start_together_record_once(store):
    answers = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(check(store, broker(), [n]))) for n in ("examples", "drift")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_installation(store).topics.keys() == {"examples", "drift"}


@pytest.mark.parametrize("name", ORDERED_TOPICS)
def test_case_14_another_partition_count_of_an_ordered_topic_is_refused(store, name):
    """Case 14, attack C: partitions added under a backlog; waiting records were overtaken and then lost."""
    check(store, broker())
    with pytest.raises(InstallationError) as refused:
        check(store, broker(counts={name: 8}))
    assert (refused.value.got, refused.value.allowed) == ("8 partitions", "4 partitions")
    assert f"`perennial topics repartition {name} --partitions 8`" in refused.value.remedy
    assert load_installation(store).topics[name].partitions == 4


def test_a_repartitioning_that_runs_allows_the_new_count(store):
    check(store, broker())
    check(store, broker(counts={"examples": 8}), allowed={"examples": 8})
    with pytest.raises(InstallationError):
        check(store, broker(counts={"examples": 9}), allowed={"examples": 8})
    record_partitions(store, "examples", 8, was=4)
    assert check(store, broker(counts={"examples": 8})).partitions()["examples"] == 8
    with pytest.raises(InstallationError, match="meanwhile"):
        record_partitions(store, "examples", 16, was=4)


@pytest.mark.parametrize("name", [*INPUT_TOPICS, *LATEST_TOPICS, "dead-letters"])
def test_other_topics_may_get_more_partitions(store, name):
    check(store, broker())
    check(store, broker(counts={name: 8}))
    if name == "retention-status":  # the roles go on writing each key to the partition that it always had
        assert load_installation(store).routed_partitions()[name] == 4


def test_subscribers_find_a_key_of_adapter_updates_by_the_broker_s_count(store):
    """A subscriber has no record to look the count up in, so learners must not go by it either."""
    assert not {"adapter-updates", "adapter-acks"} & check(store, broker()).routed_partitions().keys()


@pytest.mark.parametrize("name", [*ORDERED_TOPICS, *LATEST_TOPICS])
def test_an_internal_topic_that_was_created_again_is_refused_until_it_is_adopted(store, name):
    check(store, broker())
    again = broker(ids={name: "id-2"}, counts={name: 6})
    with pytest.raises(InstallationError, match="deleted and created again") as refused:
        check(store, again)
    assert (refused.value.got, refused.value.allowed) == ("topic id id-2", f"topic id id-{name}")
    assert f"`perennial topics adopt {name}`" in refused.value.remedy
    adopt_topics(SETTINGS, store, again, [name])
    assert check(store, again).topics[name].partitions == 6


def test_case_10_an_input_topic_may_be_created_again_and_keeps_its_ids(store):
    """Case 10: the id of `documents` was looked up once and assumed to hold; now every id is recorded."""
    check(store, broker())
    add_input_topic_id(store, "documents", "id-2")
    add_input_topic_id(store, "documents", "id-2")
    again = broker(ids={"documents": "id-3"}, counts={"documents": 2})
    check(store, again)  # `perennial topics create`: the reader must still see that the id is new
    assert load_installation(store).topics["documents"].topic_id == "id-2"
    check(store, again, by_reader=True)
    record = load_installation(store)
    assert record.known_topic_ids("documents") == ("id-documents", "id-2", "id-3")
    assert record.topics["documents"].topic_id == "id-3"
    add_input_topic_id(store, "documents.acme", "id-9")  # a tenant's topic
    assert load_installation(store).known_topic_ids("documents.acme") == ("id-9",)
    assert load_installation(store).known_topic_ids("documents.other") == ()


@pytest.mark.parametrize(
    ("tenants", "names", "missing"),
    [
        ("", ["documents", "retention", "dead-letters"], None), ("acme", ["retention.acme"], None),
        ("acme,globex", ["retention.acme"], None), ("", ["retention.acme"], "acme"),
        ("acme", ["documents.globex.eu", "interactions.acme"], "globex.eu"), ("acme", ["retention.b", "documents.a"], "a, b"),
    ],
)  # fmt: skip
def test_a_tenant_whose_topics_are_recorded_must_be_set(store, tenants, names, missing):
    """Without its name nobody reads its requests to forget, and a restore leaves its logs out."""
    settings = Settings.of(tenants=tenants, env_file=None)
    found = ClusterIds("c1", dict.fromkeys(names, "id"), dict.fromkeys(names, 1))
    record_found(settings, store, found, names[:1])
    if missing is None:
        require_recorded_tenants(settings, store, names)
        return
    with pytest.raises(InstallationError, match=f"are not set: {missing};") as refused:
        require_recorded_tenants(settings, store, names)
    wanted = ",".join(filter(None, [tenants, missing.replace(", ", ",")]))
    assert refused.value.allowed == f"PERENNIAL_TENANTS={wanted}"


def test_another_cluster_is_refused_until_it_is_adopted(store):
    check(store, broker())
    with pytest.raises(InstallationError, match="another Kafka cluster") as refused:
        check(store, broker("c2"))
    assert (refused.value.got, refused.value.allowed) == ("cluster c2", "cluster c1")
    adopt_topics(SETTINGS, store, broker("c2"), TOPICS)
    assert check(store, broker("c2")).cluster_id == "c2"


def test_a_damaged_record_is_not_replaced(store):
    store.put_if_absent(KEY, b"{}")
    with pytest.raises(IntegrityError, match=KEY):
        check(store, broker())
    assert store.get(KEY).data == b"{}"


def test_an_id_needs_a_record(store):
    with pytest.raises(InstallationError, match="no topics are recorded"):
        add_input_topic_id(store, "documents", "id")
