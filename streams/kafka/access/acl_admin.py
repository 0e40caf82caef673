"""Compare ACLs with those of a broker, and create the missing ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
)
from kafka.errors import ClusterAuthorizationFailedError, KafkaError, SecurityDisabledError

from perennial.storage.errors import PerennialError
from perennial.streams.kafka.access.acl_table import Acl, Kind, Operation
from perennial.streams.kafka.topics import admin_client
from perennial.streams.settings import Settings

_KINDS: Final[dict[Kind, ResourceType]] = {"topic": ResourceType.TOPIC, "group": ResourceType.GROUP}
_OPERATIONS: Final[dict[Operation, ACLOperation]] = {
    "Read": ACLOperation.READ, "Write": ACLOperation.WRITE, "Create": ACLOperation.CREATE,
    "Delete": ACLOperation.DELETE, "Alter": ACLOperation.ALTER, "Describe": ACLOperation.DESCRIBE,
    "DescribeConfigs": ACLOperation.DESCRIBE_CONFIGS, "AlterConfigs": ACLOperation.ALTER_CONFIGS,
}  # fmt: skip
_EVERYTHING: Final = "*"


class AclError(PerennialError):
    """The broker does not let this user see or create ACLs."""


@dataclass(frozen=True)
class AclReport:
    """The comparison of a broker's ACLs with those that an installation needs.

    Attributes:
        present: How many of them the broker has.
        missing: Those that it lacks.
        surplus: The broker's other ACLs, in words: those of the installation's principals, and those of other principals
            on the installation's topics and groups.
    """

    present: int
    missing: tuple[Acl, ...]
    surplus: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the broker allows exactly what the table says."""
        return not self.missing and not self.surplus


def compare(settings: Settings, wanted: Sequence[Acl]) -> AclReport:
    """Compare the broker's ACLs with the wanted ones.

    Args:
        settings: Name the brokers, and a user who may describe the cluster.
        wanted: What the installation needs.

    Raises:
        AclError: The broker has no authorizer, or does not let this user see ACLs.
        KafkaUnavailableError: Kafka does not answer.
    """
    with admin_client(settings) as admin:
        return _compare(admin, wanted)


def create_missing(settings: Settings, wanted: Sequence[Acl]) -> AclReport:
    """Create the wanted ACLs that the broker lacks. What it allows beyond them stays.

    Args:
        settings: Name the brokers, and a user who may alter the cluster.
        wanted: What the installation needs.

    Returns:
        The comparison before anything was created: `missing` are those that were created.

    Raises:
        AclError: The broker has no authorizer, or does not let this user create ACLs.
        KafkaUnavailableError: Kafka does not answer.
    """
    with admin_client(settings) as admin:
        report = _compare(admin, wanted)
        if report.missing:
            with _translated():
                answer = admin.create_acls([_to_kafka(acl) for acl in report.missing])
            _check_created(answer["failed"])
        return report


def _compare(admin: Any, wanted: Sequence[Acl]) -> AclReport:
    anything = ACLFilter(
        None, None, ACLOperation.ANY, ACLPermissionType.ANY,
        ResourcePatternFilter(ResourceType.ANY, None, ACLResourcePatternType.ANY),
    )  # fmt: skip
    with _translated():
        found, _ = admin.describe_acls(anything)
    there = set(found)
    needed = {_to_kafka(acl): acl for acl in wanted}
    missing = tuple(acl for kafka_acl, acl in needed.items() if kafka_acl not in there)
    principals = {acl.principal for acl in wanted}
    names = {(_KINDS[acl.kind], acl.name) for acl in wanted}
    surplus = {
        _describe(each)
        for each in found
        if each not in needed and (each.principal in principals or _is_on(each, names))
    }
    return AclReport(len(needed) - len(missing), missing, tuple(sorted(surplus)))


def _is_on(acl: Any, resources: Iterable[tuple[ResourceType, str]]) -> bool:
    """Return whether an ACL is on one of these topics and groups, by its name, by a prefix or by `*`."""
    pattern = acl.resource_pattern
    if pattern.pattern_type is ACLResourcePatternType.PREFIXED:
        return any(pattern.resource_type is kind and name.startswith(pattern.resource_name) for kind, name in resources)
    return any(
        pattern.resource_type is kind and pattern.resource_name in {name, _EVERYTHING} for kind, name in resources
    )


@contextmanager
def _translated() -> Iterator[None]:
    """Raise AclError for what the broker refuses."""
    try:
        yield
    except SecurityDisabledError as error:
        raise AclError(
            "the broker has no authorizer, so whoever reaches it may do everything", got="SECURITY_DISABLED",
            allowed="authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            remedy="set it in the broker's configuration, with super.users for its administrators, and restart it",
        ) from error  # fmt: skip
    except ClusterAuthorizationFailedError as error:
        raise _not_allowed() from error


def _not_allowed() -> AclError:
    return AclError(
        "the broker does not let this user handle ACLs", got="CLUSTER_AUTHORIZATION_FAILED",
        allowed="a user of super.users, or one with Describe (to compare) and Alter (to create) on the cluster",
        remedy="set PERENNIAL_KAFKA_USERNAME and its password to an administrator's for this command",
    )  # fmt: skip


def _check_created(failed: Sequence[type[KafkaError]]) -> None:
    if ClusterAuthorizationFailedError in failed:
        raise _not_allowed()
    if failed:
        names = sorted({error.__name__ for error in failed})
        raise AclError(
            f"{len(failed)} ACLs cannot be created", got=", ".join(names), remedy="see the broker's log, and correct it"
        )


def _to_kafka(acl: Acl) -> ACL:
    return ACL(
        acl.principal, _EVERYTHING, _OPERATIONS[acl.operation], ACLPermissionType.ALLOW,
        ResourcePattern(_KINDS[acl.kind], acl.name),
    )  # fmt: skip


def _describe(acl: Any) -> str:
    pattern = acl.resource_pattern
    kind, how = pattern.resource_type.name.lower(), pattern.pattern_type.name.lower()
    words = f"{acl.permission_type.name.lower()} {acl.operation.name.lower()} on {kind} {pattern.resource_name}"
    return f"{acl.principal}: {words}{'' if how == 'literal' else f' ({how})'} from {acl.host}"
