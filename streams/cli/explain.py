"""`perennial explain`: which events an adapter was made from, where they came from, and until when they stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perennial.storage.errors import NotFoundError
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.tables import short_version
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.retain.example_index import ExampleIndex
from perennial.streams.retain.ledger import StoredExample, expires_ms, policies_on
from perennial.streams.retain.service import load_ledger
from perennial.streams.retention.quarantine_filter import QuarantineFilter

_ERASED = "erased"


@dataclass(frozen=True)
class Line:
    """One example. Times are ISO 8601 in UTC; state: live, learned, not learned, quarantined, held, erased."""

    document_id: str | None
    example_id: str
    topic: str
    partition: int
    offset: int
    published_at: str | None
    version: str
    seq: int
    outcome: str
    gate_before_nats: float | None
    gate_after_nats: float | None
    state: str
    expires_at: str | None


def explain(adapter: str, *, document: str | None, limit: int, as_json: bool) -> int:
    """Print the examples, newest version first; exit code 4 where the document is none of them."""
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    lines = explanation(registry, adapter, settings.serving.alias)
    if document is not None:
        lines = [line for line in lines if line.document_id == document]
        if not lines:
            raise NotFoundError(
                "no such document in this adapter", got=document,
                allowed="a document whose text the store has: of what was erased only the place is known",
                remedy="without --document all examples are listed",
            )  # fmt: skip
    if as_json:
        print(json.dumps([asdict(line) for line in lines]))
        return 0
    table = Table(
        "document", "from", "published (UTC)", "learned in", "gate: held-out before → after", "state", "until (UTC)",
        title=_title(adapter, lines), title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.overflow = "fold"
    colours = {"live": "green", _ERASED: "dim", "quarantined": "yellow", "held": "yellow"}
    for line in lines[:limit]:
        gate = "-"
        if line.gate_before_nats is not None and line.gate_after_nats is not None:
            gate = f"{line.gate_before_nats:.3f} → {line.gate_after_nats:.3f} nats"
        table.add_row(
            escape(line.document_id or "-"), f"{escape(line.topic)}[{line.partition}]@{line.offset}".replace("[", r"\["),
            _minutes(line.published_at) or "-", f"{line.seq} {short_version(line.version)} {line.outcome}", gate,
            f"[{colours.get(line.state, 'default')}]{line.state}[/]",
            "-" if line.state == _ERASED else _minutes(line.expires_at) or "for ever",
        )  # fmt: skip
    Console().print(table)
    if len(lines) > limit:
        Console(stderr=True).print(f"… and {len(lines) - limit} more: --limit, or --json for all")
    return 0


def _title(adapter: str, lines: Sequence[Line]) -> str:
    gone = sum(line.state == _ERASED for line in lines)
    there = len(lines) - gone
    return f"{adapter}: {there} example{'' if there == 1 else 's'}" + (f", {gone} erased" if gone else "")


def _minutes(iso: str | None) -> str:
    return (iso or "")[:16].replace("T", " ")


def explanation(registry: Registry, adapter: str, alias: str) -> list[Line]:
    """A line per example that the store knows of, erased ones by their place alone; newest version first."""
    known = ExampleIndex(registry).of(adapter)
    manifests: dict[str, Manifest] = {}
    live = _lineage(registry, adapter, alias, manifests)
    screen = QuarantineFilter(load_quarantine(registry.store, adapter))
    book = load_ledger(registry.store)[0]
    policies = policies_on(book, adapter)
    lines = []
    for item in known:
        manifest = manifests.get(item.version) or registry.manifest(adapter, item.version)
        end_ms = expires_ms(item.example, policies)
        lines.append(_line(item, manifest, _state(item, screen, live), end_ms))
    seen = {item.example.example_id for item in known}
    for _, version in registry.versions(adapter):
        manifest = registry.manifest(adapter, version)
        for learned in manifest.learned:
            if learned.example_id not in seen:
                seen.add(learned.example_id)
                _, topic, partition = learned.partition.rsplit("/", 2)
                lines.append(
                    Line(
                        None, learned.example_id, topic, int(partition), learned.offset, None, version, manifest.seq,
                        manifest.outcome, None, None, _ERASED, None,
                    )
                )  # fmt: skip
    return sorted(lines, key=lambda line: (-line.seq, line.topic, line.partition, line.offset))


def _lineage(registry: Registry, adapter: str, alias: str, manifests: dict[str, Manifest]) -> set[str]:
    """Ids of the examples that the live version knows; fills in the manifests on its way."""
    state = registry.alias(adapter, alias)
    version = state.version if state and state.kind != "retired" else None
    ids: set[str] = set()
    while version is not None:
        manifest = manifests[version] = registry.manifest(adapter, version)
        if manifest.outcome == "promoted":
            ids |= {item.example_id for item in manifest.learned}
        version = manifest.parent
    return ids


def _state(item: StoredExample, screen: QuarantineFilter, live: set[str]) -> str:
    if screen.entry_of(item.example) is not None:
        return "quarantined"
    if screen.held_by(item.example) is not None:
        return "held"
    if item.example.example_id in live:
        return "live"
    return "learned" if item.learned else "not learned"


def _line(item: StoredExample, manifest: Manifest, state: str, end_ms: int | None) -> Line:
    example, origin = item.example, item.example.origin
    before, after = manifest.gate.held_out_before, manifest.gate.held_out_after
    return Line(
        example.document_id, example.example_id, origin.topic, origin.partition, origin.offset,
        _iso(origin.timestamp_ms), item.version, item.seq, manifest.outcome,
        before, after, state,
        None if end_ms is None else _iso(end_ms),
    )  # fmt: skip


def _iso(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")
