"""Write the tables of docs/security.md and the policies in deploy/minio: `python -m tools.generate_security_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from perennial.storage.access import store_table
from perennial.streams.kafka.access import acl_table
from perennial.streams.kafka.topics import TOPICS
from tools.generate_readme_table import write

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/security.md"
POLICIES = ROOT / "deploy/minio"
BUCKET = "perennial"

_SHORT: Mapping[acl_table.Operation, str] = {
    "Read": "read", "Write": "write", "Create": "create", "Delete": "delete", "Alter": "alter", "Describe": "describe",
    "DescribeConfigs": "configs", "AlterConfigs": "alter configs",
}  # fmt: skip


def topics_table() -> str:
    """Return what each role may do with each topic as a Markdown table."""
    return _access_table("topic", TOPICS)


def groups_table() -> str:
    """Return what each role may do with each consumer group as a Markdown table."""
    return _access_table("group", acl_table.GROUPS)


def roles_table() -> str:
    """Return the roles and their purposes as a Markdown table."""
    rows = {name: access.purpose for name, access in acl_table.ROLES.items()}
    rows |= {name: access.purpose for name, access in store_table.ROLES.items() if name not in rows}
    lines = [
        f"| {name} | {purpose} | {_yes(name in acl_table.ROLES)} | {_yes(name in store_table.ROLES)} |\n"
        for name, purpose in rows.items()
    ]
    return "| role | who acts in it | principal in Kafka | account in the store |\n|---|---|---|---|\n" + "".join(lines)


def objects_table() -> str:
    """Return what each role may do with each kind of object as a Markdown table: r, w and d."""
    rights: tuple[store_table.Right, ...] = ("read", "write", "delete")
    rows = []
    for folder in store_table.FOLDERS:
        cells = [
            "".join(right[0] for right in rights if access.may(folder, right)) for access in store_table.ROLES.values()
        ]
        rows.append(f"| `{folder}` | {' | '.join(cells)} |\n")
    return _head("object", store_table.ROLES) + "".join(rows)


def _access_table(kind: acl_table.Kind, names: Mapping[str, object] | tuple[str, ...]) -> str:
    rows = []
    for name in names:
        cells = [
            ", ".join(_SHORT[each] for each in access.of(kind).get(name, ())) for access in acl_table.ROLES.values()
        ]
        rows.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return _head(kind, acl_table.ROLES) + "".join(rows)


def _head(first: str, roles: Mapping[str, object]) -> str:
    return f"| {first} | {' | '.join(roles)} |\n|---|{'---|' * len(roles)}\n"


def _yes(value: bool) -> str:
    return "yes" if value else ""


TABLES = {
    "roles": roles_table, "topics": topics_table, "groups": groups_table, "objects": objects_table,
}  # fmt: skip


if __name__ == "__main__":
    write(DOCUMENT, TABLES)
    for role in store_table.ROLES:
        (POLICIES / f"{role}.json").write_text(store_table.policy_text(role, BUCKET), "utf-8")
