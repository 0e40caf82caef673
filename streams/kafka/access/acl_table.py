"""What each role may do with topics and consumer groups, and the ACLs of Kafka's StandardAuthorizer that follow.

The table allows; what it does not name is denied, by a broker whose `allow.everyone.if.no.acl.found` is false, its
default. No role may delete a topic or change a topic's configs, and no role has a permission on the cluster. There are no
transactional ids, because nothing here uses Kafka's transactions. An idempotent producer needs no permission besides
Write on a topic (KIP-679).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from shlex import quote
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from perennial.streams.events.tenants import TENANT_TOPICS, base_topic, tenant_topic, with_tenants
from perennial.streams.kafka.installation import LATEST_TOPICS, ORDERED_TOPICS
from perennial.streams.kafka.topics import TOPICS
from perennial.streams.settings import Settings

Kind = Literal["topic", "group"]
Operation = Literal["Read", "Write", "Create", "Delete", "Alter", "Describe", "DescribeConfigs", "AlterConfigs"]

GROUPS: Final = ("intake", "scorer", "curate", "learner")
"""Consumer groups, without the prefix. The agents curate and retain are one Faust application, so they share a group."""
IMPLIED: Final[Mapping[Operation, frozenset[Operation]]] = MappingProxyType(
    {
        **dict.fromkeys(("Read", "Write", "Delete", "Alter"), frozenset({"Describe"})),
        "AlterConfigs": frozenset({"DescribeConfigs"}),
    }
)
"""What Kafka allows to whoever has an operation, besides the operation itself."""
DEFAULT_PRINCIPAL_PREFIX: Final = "perennial-"


@dataclass(frozen=True)
class RoleAccess:
    """What one role may do.

    Attributes:
        purpose: Who acts in this role.
        topics: Operations by topic name without the prefix.
        groups: Operations by consumer group without the prefix.
    """

    purpose: str
    topics: Mapping[str, tuple[Operation, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[Operation, ...]] = field(default_factory=dict)

    def of(self, kind: Kind) -> Mapping[str, tuple[Operation, ...]]:
        """Return the operations by name, of topics or of groups."""
        return self.topics if kind == "topic" else self.groups

    def may(self, kind: Kind, name: str, operation: Operation) -> bool:
        """Return whether the role may do it: where the table says so, or an operation that it names implies it.

        Args:
            kind: Topic or consumer group.
            name: The name without the prefix.
            operation: What the role wants to do.
        """
        given = self.of(kind).get(name, ())
        return operation in given or any(operation in IMPLIED.get(each, ()) for each in given)


def _grant(operations: Mapping[Operation, Iterable[str]]) -> Mapping[str, tuple[Operation, ...]]:
    """Return the operations by name, from names by operation."""
    found: dict[str, tuple[Operation, ...]] = {}
    for operation, names in operations.items():
        for name in names:
            found[name] = (*found.get(name, ()), operation)
    return MappingProxyType(found)


_ORIGINS: Final = ("documents", "interactions")
# Origins of examples are compared with the logs that they name (streams/kafka/origin_check.py).
_DESCRIBES_ORIGINS: Final[Mapping[Operation, Iterable[str]]] = {"Describe": _ORIGINS}

ROLES: Final[Mapping[str, RoleAccess]] = MappingProxyType({
    "intake": RoleAccess(
        "the role that validates what comes from outside",
        _grant({"Read": _ORIGINS, "Write": ("examples", "dead-letters")}),
        _grant({"Read": ("intake",)}),
    ),
    "scorer": RoleAccess(
        "the role that measures examples",
        _grant({"Read": ("examples",), "Write": ("scored-examples", "dead-letters"), **_DESCRIBES_ORIGINS}),
        _grant({"Read": ("scorer",)}),
    ),
    "streams": RoleAccess(
        "the agents curate and retain",
        _grant({
            "Read": ("scored-examples", "retention", "adapter-acks"),
            # It deletes the records of replicas that left from adapter-acks, every hour.
            "Write": ("drift", "adapter-jobs", "retention-status", "adapter-acks", "dead-letters"),
            **_DESCRIBES_ORIGINS,
        }),
        # Delete: offsets in a topic `retention` that was created again are deleted before it is read.
        _grant({"Read": ("curate",), "Delete": ("curate",)}),
    ),
    "learner": RoleAccess(
        "the role that trains, forgets and publishes versions",
        _grant({
            "Read": ("adapter-jobs",), "Write": ("adapter-updates", "retention-status", "dead-letters"),
            **_DESCRIBES_ORIGINS,
        }),
        _grant({"Read": ("learner",)}),
    ),
    "subscriber": RoleAccess(
        "processes that serve versions",
        _grant({"Read": ("adapter-updates",), "Write": ("adapter-acks",)}),
    ),
    "publisher": RoleAccess(
        "programs that publish documents and interactions",
        _grant({"Write": _ORIGINS}),
    ),
    "requester": RoleAccess(
        "people and programs that ask to forget",
        _grant({"Read": ("retention-status",), "Write": ("retention",)}),
    ),
    "operator": RoleAccess(
        "people with the commands status, doctor, adapters, dlq, forget, marks, replicas and topics adopt",
        _grant({
            "Read": TOPICS,
            # The redrive of dead letters writes documents, interactions and retention; a rollback writes adapter-jobs
            # and adapter-updates, a rebase adapter-jobs; `replicas rm` writes adapter-acks.
            "Write": (*_ORIGINS, "retention", "adapter-jobs", "adapter-updates", "adapter-acks"),
            "DescribeConfigs": TOPICS,
        }),
        # Delete: `topics adopt` deletes the offsets in a topic that was created again; Kafka wants Read on it, too.
        _grant({"Describe": GROUPS, "Delete": GROUPS}),
    ),
    "provisioner": RoleAccess(
        "the commands init, topics create and topics repartition",
        _grant({
            "Create": TOPICS, "Describe": TOPICS, "DescribeConfigs": TOPICS,
            "Alter": (*ORDERED_TOPICS, *LATEST_TOPICS),  # to add partitions
        }),
        _grant({"Describe": GROUPS}),
    ),
})  # fmt: skip
"""Roles by name."""


_OF_TENANTS: Final = ("publisher", "requester", "subscriber")
"""Roles that each tenant has for itself, instead of the whole installation."""


def roles_of(tenants: Sequence[str]) -> Mapping[str, RoleAccess]:
    """Return the roles of an installation by name.

    Where there are tenants, each has a publisher, a requester and a subscriber for itself, and nobody but operators may
    write to the topics of no tenant. `adapter-updates`, `adapter-acks` and `retention-status` are shared: a subscriber sees
    the names and versions of all adapters, and a requester the ids and states of all requests.

    Args:
        tenants: The tenants that have topics of their own.

    >>> sorted(roles_of(["acme"])["publisher.acme"].topics)
    ['documents.acme', 'interactions.acme']
    """
    if not tenants:
        return ROLES
    found = {name: _in_all_topics(access, tenants) for name, access in ROLES.items() if name not in _OF_TENANTS}
    for role in _OF_TENANTS:
        for tenant in tenants:
            found[f"{role}.{tenant}"] = _in_topics_of(ROLES[role], tenant)
    return MappingProxyType(found)


def _in_all_topics(access: RoleAccess, tenants: Sequence[str]) -> RoleAccess:
    names = with_tenants(access.topics, tenants)
    return replace(access, topics=MappingProxyType({name: access.topics[base_topic(name)] for name in names}))


def _in_topics_of(access: RoleAccess, tenant: str) -> RoleAccess:
    topics = {
        tenant_topic(name, tenant) if name in TENANT_TOPICS else name: given for name, given in access.topics.items()
    }
    return replace(access, purpose=f"{access.purpose}, of {tenant}", topics=MappingProxyType(topics))


class Acl(NamedTuple):
    """One permission, on a topic or a group with exactly this name, from any host.

    Attributes:
        principal: Who has it, such as `User:perennial-intake`.
        kind: Topic or consumer group.
        name: The name with the prefix.
        operation: What is allowed.
    """

    principal: str
    kind: Kind
    name: str
    operation: Operation


def principals_of(
    prefix: str, named: Iterable[tuple[str, str]] = (), roles: Iterable[str] = tuple(ROLES)
) -> dict[str, list[str]]:
    """Return the principals of every role.

    Args:
        prefix: Precedes a role's name in the name of its principal.
        named: Roles with principals that take the place of the role's own; a role may have several.
        roles: The roles of the installation; see `roles_of`.

    Returns:
        Principals such as `User:perennial-intake`, by role.

    >>> principals_of("p-", [("subscriber", "User:CN=eu"), ("subscriber", "us")])["subscriber"]
    ['User:CN=eu', 'User:us']
    >>> principals_of("p-")["intake"]
    ['User:p-intake']
    """
    found: dict[str, list[str]] = {}
    for role, name in named:
        found.setdefault(role, []).append(name if name.startswith("User:") else f"User:{name}")
    return {role: found.get(role) or [f"User:{prefix}{role}"] for role in roles}


def acls_of(settings: Settings, principals: Mapping[str, Sequence[str]]) -> list[Acl]:
    """Return the ACLs of an installation, in the order of the table.

    Args:
        settings: Name the topic prefix, which consumer groups have, too, and the tenants.
        principals: Principals by role.
    """
    return list(_acls(settings, principals))


def _acls(settings: Settings, principals: Mapping[str, Sequence[str]]) -> Iterator[Acl]:
    kinds: tuple[Kind, ...] = ("topic", "group")
    roles = roles_of(settings.tenants.names)
    for role, names in principals.items():
        for principal in names:
            for kind in kinds:
                for name, operations in roles[role].of(kind).items():
                    for operation in operations:
                        yield Acl(principal, kind, settings.kafka.topic(name), operation)


def command_lines(acls: Iterable[Acl], bootstrap: str, *, remove: bool = False) -> list[str]:
    """Return the ACLs as lines of a shell, one for each principal and resource.

    Args:
        acls: The ACLs; those of one principal and resource follow each other.
        bootstrap: Brokers as `host:port[,host:port]`.
        remove: Return lines that remove them.
    """
    action = "--remove --force" if remove else "--add"
    lines = []
    for (principal, kind, name), each in groupby(acls, key=lambda acl: acl[:3]):
        operations = " ".join(f"--operation {acl.operation}" for acl in each)
        lines.append(
            f"kafka-acls.sh --bootstrap-server {quote(bootstrap)} --command-config admin.properties {action} "
            f"--allow-principal {quote(principal)} {operations} --{kind} {quote(name)}"
        )
    return lines
