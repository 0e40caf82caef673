"""A broker with TLS, SCRAM and StandardAuthorizer, users for every role, and a client that tries acts as one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from kafka.admin import ScramMechanism as Mechanism
from kafka.admin import UserScramCredentialUpsertion as Upsertion
from kafka.errors import TopicAuthorizationFailedError
from kafka.protocol.consumer import FetchRequest

from perennial.streams.intake.librdkafka import client_log, make_admin
from perennial.streams.kafka.access.acl_admin import AclError, compare
from perennial.streams.kafka.access.acl_table import Operation
from perennial.streams.kafka.security.options import librdkafka_options
from perennial.streams.kafka.topics import admin_client
from perennial.streams.settings import Settings
from tests.secure_broker import Authority, Certificate, SecureBroker

ADMIN: Final = "User:CN=admin"
LIMIT_S: Final = 120.0
MANY_PARTITIONS: Final = 64
_REFUSALS: Final = frozenset({
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
})  # fmt: skip
_NO_COORDINATOR = frozenset({
    KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
})  # fmt: skip
_PASSED = _NO_COORDINATOR | {
    KafkaError.TOPIC_ALREADY_EXISTS, KafkaError.GROUP_ID_NOT_FOUND, KafkaError.NON_EMPTY_GROUP,
}  # fmt: skip
"""Codes of what the broker looks at after it has asked its authorizer."""
_FetchTopic = FetchRequest.FetchTopic
_FetchPartition = _FetchTopic.FetchPartition
_Futures = Mapping[Any, Future[Any]]


@dataclass(frozen=True)
class GuardedSite:
    """The broker, and what clients need for it.

    Attributes:
        broker: The broker; it lets nobody but `ADMIN` do what no ACL allows.
        folder: A folder for files of tests.
        authority: Signs certificates.
        admin_certificate: The certificate of `ADMIN`.
    """

    broker: SecureBroker
    folder: Path
    authority: Authority
    admin_certificate: Certificate

    def admin(self, prefix: str = "") -> Settings:
        """Return the settings of the administrator, who uses mutual TLS."""
        return self._settings(
            "MUTUAL", prefix, security="ssl", cert_file=self.admin_certificate.cert, key_file=self.admin_certificate.key
        )

    def user(self, name: str, prefix: str = "") -> Settings:
        """Return the settings of a user, who uses TLS and SCRAM."""
        return self._settings(
            "SECURE",
            prefix,
            security="sasl_ssl",
            sasl_mechanism="SCRAM-SHA-512",
            username=name,
            password=password_of(name),
        )

    def nobody(self, prefix: str = "") -> Settings:
        """Return the settings of somebody on the plain listener, who has no name."""
        return Settings.of(env_file=None, kafka=self.broker.bootstrap, topic_prefix=prefix, partitions=1)

    def add_users(self, names: Iterable[str]) -> None:
        """Create SCRAM users."""
        changes = [Upsertion(name, Mechanism.SCRAM_SHA_512, password_of(name)) for name in names]
        with admin_client(self.admin()) as admin:
            assert set(admin.alter_user_scram_credentials(changes).values()) == {None}

    def _settings(self, listener: str, prefix: str, **security: object) -> Settings:
        given = {"ca_file": self.authority.ca_file, **security}
        return Settings.of(
            env_file=None, kafka=self.broker.address(listener), topic_prefix=prefix, partitions=1,
            **{f"kafka_{name}": str(value) for name, value in given.items()},
        )  # fmt: skip


def password_of(name: str) -> str:
    """Return the password of a user."""
    return f"password of {name}"


class Trier:
    """Tries acts at the broker as one user, by librdkafka's clients. Nothing that works changes a topic.

    Args:
        settings: Name the user.
    """

    def __init__(self, settings: Settings) -> None:
        self._options = {
            "bootstrap.servers": settings.kafka.require_bootstrap(), "topic.metadata.refresh.interval.ms": 500,
            **librdkafka_options(settings.kafka_security),
        }  # fmt: skip
        self._settings = settings
        self._admin = make_admin(self._options)

    def topics(self, operation: Operation, names: Sequence[str]) -> dict[str, bool]:
        """Try an operation on topics that exist; return for each whether it was allowed.

        Args:
            operation: The operation.
            names: Names with the prefix.
        """
        tries: dict[Operation, Callable[[Sequence[str]], dict[str, bool]]] = {
            "Read": self._read, "Write": self._write,
            "Create": lambda names: _allowed(self._admin.create_topics(
                [NewTopic(name, num_partitions=1, replication_factor=1) for name in names], validate_only=True
            )),
            "Delete": lambda names: _allowed(self._admin.delete_topics(list(names))),
            "Alter": lambda names: _allowed(self._admin.create_partitions(
                [NewPartitions(name, MANY_PARTITIONS) for name in names], validate_only=True
            )),
            "Describe": lambda names: _allowed(self._admin.describe_topics(TopicCollection(list(names)))),
            "DescribeConfigs": self._describe_configs, "AlterConfigs": self._alter_configs,
        }  # fmt: skip
        return tries[operation](names)

    def groups(self, operation: Operation, names: Sequence[str], topic: str) -> dict[str, bool]:
        """Try an operation on consumer groups; return for each whether it was allowed.

        Args:
            operation: Read (to commit an offset), Describe or Delete.
            names: Names with the prefix.
            topic: The topic, with the prefix, that the offset is of.
        """
        position = TopicPartition(topic, 0, 0)
        if operation == "Delete":
            return _allowed(self._admin.delete_consumer_groups(list(names)))
        found = {}
        for name in names:
            if operation == "Read":
                found[name] = self._commits(ConsumerGroupTopicPartitions(name, [position]))
            else:
                found |= _allowed(self._admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(name)]))
        return found

    def _commits(self, offsets: ConsumerGroupTopicPartitions) -> bool:
        """Commit an offset, once the broker leads the group; the first commits of a young broker find no leader."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            answer = self._admin.alter_consumer_group_offsets([offsets])
            try:
                codes = {
                    each.error.code()
                    for each in answer[offsets.group_id].result(LIMIT_S).topic_partitions
                    if each.error
                }
            except KafkaException as error:
                codes = {error.args[0].code()}
            if not codes & _NO_COORDINATOR:
                assert codes <= _REFUSALS, codes
                return KafkaError.GROUP_AUTHORIZATION_FAILED not in codes  # without Read on the topic comes another
            assert time.monotonic() < deadline, "the group has no coordinator"
            time.sleep(0.1)

    def cluster(self) -> dict[str, bool]:
        """Try what only an administrator may do; return for each act whether it was allowed."""
        acl = AclBinding(
            ResourceType.TOPIC,
            "*",
            ResourcePatternType.LITERAL,
            "User:*",
            "*",
            AclOperation.ALL,
            AclPermissionType.ALLOW,
        )
        secret = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        broker = ConfigResource(
            ConfigResource.Type.BROKER, "1",
            incremental_configs=[ConfigEntry("log.cleaner.threads", "1", incremental_operation=AlterConfigOpType.SET)],
        )  # fmt: skip
        acts: dict[str, Callable[[], _Futures]] = {
            "allow everybody everything": lambda: self._admin.create_acls([acl]),
            "create another topic": lambda: self._admin.create_topics(
                [NewTopic("a-topic-that-no-role-needs", num_partitions=1, replication_factor=1)]
            ),
            "set the administrator's password": lambda: self._admin.alter_user_scram_credentials(
                [UserScramCredentialUpsertion("admin", secret, b"mine")]
            ),
            "change the broker's configuration": lambda: self._admin.incremental_alter_configs([broker]),
        }  # fmt: skip
        found = {act: all(_allowed(attempt()).values()) for act, attempt in acts.items()}
        try:  # not by librdkafka 2.12, which takes a refusal for an empty list
            compare(self._settings, [])
        except AclError:
            return {"see ACLs": False, **found}
        return {"see ACLs": True, **found}

    def _describe_configs(self, names: Sequence[str]) -> dict[str, bool]:
        resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
        return _allowed({each.name: future for each, future in self._admin.describe_configs(resources).items()})

    def _alter_configs(self, names: Sequence[str]) -> dict[str, bool]:
        entry = ConfigEntry("retention.ms", "1000", incremental_operation=AlterConfigOpType.SET)
        resources = [ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=[entry]) for name in names]
        answers = self._admin.incremental_alter_configs(resources, validate_only=True)
        return _allowed({each.name: future for each, future in answers.items()})

    def _write(self, names: Sequence[str]) -> dict[str, bool]:
        found: dict[str, bool] = {}

        def delivered(name: str, error: KafkaError | None, _: Message) -> None:
            found[name] = not _is_refusal(error)

        producer = Producer({**self._options, "message.timeout.ms": int(LIMIT_S * 1000)}, logger=client_log)
        for name in names:
            producer.produce(name, b"written by a test", b"key", partition=0, on_delivery=partial(delivered, name))
        assert producer.flush(LIMIT_S) == 0
        return found

    def _read(self, names: Sequence[str]) -> dict[str, bool]:
        """Fetch the first record of each topic; every one has a record.

        By the request itself: consumers wait for ever for a topic that they may not even describe, and tell nobody.
        """
        found = {}
        with admin_client(self._settings) as admin:
            for name in names:
                partition = _FetchPartition(partition=0, fetch_offset=0, partition_max_bytes=1 << 20)
                request = FetchRequest(
                    max_wait_ms=1000, min_bytes=1, topics=[_FetchTopic(topic=name, partitions=[partition])],
                    max_version=12,  # later ones name topics by their ids
                )  # fmt: skip
                answer = admin._manager.run(admin._manager.send, request)
                (of_topic,) = answer.responses
                (of_partition,) = of_topic.partitions
                code = of_partition.error_code
                assert code in {0, TopicAuthorizationFailedError.errno}, code
                assert code or of_partition.records, f"{name} has no record"
                found[name] = not code
        return found


def _allowed(answers: _Futures) -> dict[str, bool]:
    """Return for each answer whether the broker allowed the act: any other error comes after the authorizer."""
    found = {}
    for name, future in answers.items():
        try:
            future.result(LIMIT_S)
        except KafkaException as error:
            found[name] = not _is_refusal(error.args[0])
        else:
            found[name] = True
    return found


def _is_refusal(error: KafkaError | None) -> bool:
    """Return whether the authorizer refused; raise an error that says neither this nor that it let the act pass."""
    if error is None or error.code() in _PASSED:
        return False
    if error.code() not in _REFUSALS:
        raise KafkaException(error)
    return True
