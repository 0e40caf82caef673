"""`perennial forget --dry-run`: show what a request would forget, without sending it."""

from __future__ import annotations

import json
from typing import TypedDict

from rich.console import Console
from rich.text import Text

from perennial.storage.registry.history.dependants import dependants
from perennial.storage.registry.history.index import IndexedHistory
from perennial.storage.registry.history.pages import IndexedVersion
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry
from perennial.streams.cli.forget.selection import count_of
from perennial.streams.cli.tables import Column, print_table, short_version
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.cli.terminal.times import spoken_time
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.events.models import Selector
from perennial.streams.retain.example_index import learned_ids, stored_examples
from perennial.streams.retain.ledger import StoredExample, covers
from perennial.streams.retain.request_store import load_in_force
from perennial.streams.retain.rules.in_force import InForce
from perennial.streams.retention.example_rows import history_index

_MAX_SHOWN = 20
_COLUMNS = (
    Column("document", wraps=True),
    Column("published", 2),
    Column("learned", 1),
    Column("seq", 3, right=True),
    Column("version", 1, shorten=short_version),
    Column("held", 1),
)


class _Example(TypedDict):
    example_id: str
    document_id: str
    seq: int
    version: str
    learned: bool
    held: bool
    published_at: str


class _Plan(TypedDict):
    """The effect that a request would have on one adapter.

    `versions`: those that were trained on a selected example, directly or through a parent. `replayed`: the updates
    that the learner would train again. `dependants`: adapters that may depend on a version of this
    one; they would be rebuilt, too.
    """

    adapter: str
    versions: list[str]
    replayed: int
    dependants: list[str]
    examples: list[_Example]


def show_plan(pattern: str, selector: Selector, *, as_json: bool) -> int:
    """Print which examples a request would forget.

    Args:
        pattern: An adapter or a pattern.
        selector: Which examples.
        as_json: Print JSON with all examples; otherwise tables with the first ones.

    Returns:
        The exit code: 0, or 4 where the store has no such example.
    """
    registry = open_registry(connected_settings())
    in_force = load_in_force(registry.store)
    plans = [_plan(registry, in_force, name, selector) for name in registry.adapters() if covers(pattern, name)]
    plans = [plan for plan in plans if plan["examples"]]
    if as_json:
        print(json.dumps({"adapter": pattern, "selector": selector.model_dump(mode="json"), "adapters": plans}))
    elif plans:
        for plan in plans:
            _print_plan(plan)
    else:
        Console(stderr=True).print(
            "the store has no such example; a request would still keep out what is on its way through the topics",
            soft_wrap=True,
        )
    return 0 if plans else 4


def _print_plan(plan: _Plan) -> None:
    console = Console()
    examples = plan["examples"]
    title = (
        f"{plan['adapter']}: {count_of(len(examples), 'example')} to forget, "
        f"{count_of(len(plan['versions']), 'version')} to revoke, {count_of(plan['replayed'], 'update')} to train again"
    )
    users = plan["dependants"]
    if users:
        title += f", {count_of(len(users), 'adapter')} that may depend on it to rebuild"
    console.print(Text(printable(title), "bold"), soft_wrap=True)
    rows = [
        (
            item["document_id"], item["published_at"], "yes" if item["learned"] else "no", str(item["seq"]),
            item["version"], "yes" if item["held"] else "no",
        )
        for item in examples[:_MAX_SHOWN]
    ]  # fmt: skip
    print_table(_COLUMNS, rows, console=console)
    if len(examples) > _MAX_SHOWN:
        console.print(f"… and {len(examples) - _MAX_SHOWN} more; --json lists all", soft_wrap=True)
    held = sum(item["held"] for item in examples)
    if held:
        console.print(
            f"{count_of(held, 'example')} on hold: the whole request would wait for `perennial forget release`",
            soft_wrap=True,
        )


def _plan(registry: Registry, in_force: InForce, adapter: str, selector: Selector) -> _Plan:
    head = registry.head(adapter)
    if head is None:
        return {"adapter": adapter, "versions": [], "replayed": 0, "dependants": [], "examples": []}
    history = history_index(registry, adapter).load(head)
    selected = [item for item in stored_examples(registry, adapter, history) if selector.matches(item.example)]
    ids = {item.example.example_id for item in selected}
    contaminated: list[str] = []
    replayed = 0
    for version, learned, has_batch in _promoted_ancestors(registry, adapter, history):
        if contaminated or learned & ids:
            contaminated.append(version)
            replayed += has_batch
    holds = in_force.hold_matchers(adapter)
    return {
        "adapter": adapter,
        "versions": contaminated,
        "replayed": replayed,
        "dependants": dependants(registry.store, adapter) if contaminated else [],
        "examples": [_facts(item, any(matches(item.example) for matches in holds)) for item in selected],
    }


def _facts(item: StoredExample, held: bool) -> _Example:
    return {
        "example_id": item.example.example_id, "document_id": item.example.document_id, "seq": item.seq,
        "version": item.version, "learned": item.learned, "held": held,
        "published_at": spoken_time(item.example.origin.timestamp_ms),
    }  # fmt: skip


def _promoted_ancestors(registry: Registry, adapter: str, history: IndexedHistory) -> list[tuple[str, set[str], bool]]:
    """Return the promoted versions that the newest one stems from, oldest first.

    Each with the ids of the stored examples that it learned and whether it has a micro-batch.
    """
    promoted: list[IndexedVersion] = []
    version: str | None = history.head
    while version is not None:
        node = history.versions[version]
        if node.outcome == "promoted":
            promoted.append(node)
        version = node.parent
    learned = learned_ids(registry, adapter, history, promoted)
    return [(node.version, learned[node.version], node.batch is not None) for node in promoted[::-1]]
