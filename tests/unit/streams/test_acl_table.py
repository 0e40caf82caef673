"""The table of ACLs: it covers what the roles do, and the lines that are printed from it."""

from __future__ import annotations

import pytest

from perennial.streams.cli.access.acls_command import run_acls
from perennial.streams.cli.flow import GROUPS as FLOW_GROUPS
from perennial.streams.deadletters.redrive_plan import REDRIVABLE_TOPICS
from perennial.streams.kafka.access.acl_admin import _OPERATIONS
from perennial.streams.kafka.access.acl_table import GROUPS, IMPLIED, ROLES, acls_of, command_lines, principals_of
from perennial.streams.kafka.installation import ROLE_TOPICS
from perennial.streams.kafka.repartition import READERS
from perennial.streams.kafka.topics import TOPICS
from perennial.streams.settings import Settings, SettingsError


def test_every_name_exists():
    for role, access in ROLES.items():
        assert set(access.topics) <= set(TOPICS), role
        assert set(access.groups) <= set(GROUPS), role
        operations = {operation for each in (*access.topics.values(), *access.groups.values()) for operation in each}
        assert operations <= set(_OPERATIONS), role
    assert set(GROUPS) == set(READERS.values()) | set(FLOW_GROUPS)


def test_each_role_may_look_at_the_topics_that_it_compares_with_the_installation_record():
    for role, topics in ROLE_TOPICS.items():
        for topic in topics:
            assert ROLES[role].may("topic", topic, "Describe"), (role, topic)
            assert {"Read", "Write"} & set(ROLES[role].topics[topic]), (role, topic)


def test_the_reader_of_each_topic_may_read_it_and_commit():
    role_of = {"curate": "streams"}
    for topic, group in READERS.items():
        role = ROLES[role_of.get(group, group)]
        assert role.may("topic", topic, "Read")
        assert role.may("group", group, "Read")


def test_only_the_producer_of_a_topic_and_operators_may_write_it():
    writers = {
        topic: {role for role, access in ROLES.items() if access.may("topic", topic, "Write")} for topic in TOPICS
    }
    assert writers == {
        "documents": {"publisher", "operator"}, "interactions": {"publisher", "operator"},
        "retention": {"requester", "operator"}, "examples": {"intake"}, "scored-examples": {"scorer"},
        "drift": {"streams"}, "adapter-jobs": {"streams", "operator"}, "retention-status": {"streams", "learner"},
        "adapter-updates": {"learner", "operator"}, "adapter-acks": {"subscriber", "streams", "operator"},
        "dead-letters": {"intake", "scorer", "streams", "learner"},
    }  # fmt: skip
    assert all("operator" in writers[topic] for topic in REDRIVABLE_TOPICS)


@pytest.mark.parametrize("operation", ["Delete", "AlterConfigs"])
def test_nobody_may_delete_a_topic_or_change_its_configs(operation):
    assert not any(access.may("topic", topic, operation) for access in ROLES.values() for topic in TOPICS)


def test_texts_are_read_only_by_the_roles_that_need_them_and_operators():
    readers = {role for role, access in ROLES.items() if access.may("topic", "documents", "Read")}
    assert readers == {"intake", "operator"}


def test_an_operation_implies_what_kafka_says():
    assert ROLES["intake"].may("topic", "documents", "Describe")
    assert not ROLES["publisher"].may("topic", "documents", "Read")
    assert not ROLES["subscriber"].may("group", "learner", "Describe")
    assert "DescribeConfigs" not in IMPLIED["Read"]


def test_lines_for_kafka_acls():
    settings = Settings.of(env_file=None, topic_prefix="eu-")
    acls = [acl for acl in acls_of(settings, principals_of("p-")) if acl.principal == "User:p-operator"]
    lines = command_lines(acls, "k1:9092,k2:9092")
    assert lines[0] == (
        "kafka-acls.sh --bootstrap-server k1:9092,k2:9092 --command-config admin.properties --add "
        "--allow-principal User:p-operator --operation Read --operation Write --operation DescribeConfigs "
        "--topic eu-documents"
    )
    assert lines[-1].endswith("--operation Describe --operation Delete --group eu-learner")
    assert len(lines) == len(TOPICS) + len(GROUPS)
    quoted = acls_of(settings, principals_of("", [("intake", "CN=my intake")]))[:1]
    (line,) = command_lines(quoted, "k:1", remove=True)
    assert "--remove --force --allow-principal 'User:CN=my intake' --operation Read --topic eu-documents" in line


def test_an_option_that_is_not_usable_is_refused():
    for named in (["boss=x"], ["intake"], ["intake="]):
        with pytest.raises(SettingsError, match="ROLE=NAME with a role of intake"):
            run_acls("p-", named, apply=False, check=False, remove=False, as_json=False)
    with pytest.raises(SettingsError, match="exclude each other"):
        run_acls("p-", [], apply=True, check=True, remove=False, as_json=False)
