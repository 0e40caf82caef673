"""`perennial explain`: show which events an adapter learned, where they came from, and until when they stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from unicodedata import normalize

from rich.console import Console
from rich.text import Text

from perennial.storage.errors import NotFoundError
from perennial.storage.registry.history.example_ids import ExampleIds
from perennial.storage.registry.history.index import IndexedHistory
from perennial.storage.registry.history.pages import IndexedVersion
from perennial.storage.registry.quarantine import load_quarantine
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.tables import Column, Row, print_table, short_version
from perennial.streams.cli.terminal.printable import printable
from perennial.streams.cli.terminal.times import iso_time
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.retain.example_index import learned_ids, stored_examples
from perennial.streams.retain.ledger import StoredExample, expires_ms
from perennial.streams.retain.request_store import load_in_force
from perennial.streams.retention.example_rows import history_index
from perennial.streams.retention.quarantine_filter import QuarantineFilter

_ERASED = "erased"
_COLOURS = {"live": "green", _ERASED: "dim", "quarantined": "yellow", "held": "yellow"}
_COLUMNS = (
    Column("document", wraps=True),
    Column("from", 3, wraps=True),
    Column("published (UTC)", 6),
    Column("seq", 7, right=True),
    Column("version", 1, shorten=short_version),
    Column("outcome", 4),
    Column("held-out loss (nats)", 5),
    Column("state"),
    Column("until (UTC)", 2),
)


@dataclass(frozen=True)
class ExplainedExample:
    """The origin of one example, and what became of it.

    Times are ISO 8601 in UTC; a time past the year 9999 is `after 9999`.

    Attributes:
        document_id: Id of the document or interaction; None where its text is erased.
        example_id: Id of the example; of an erased one the id that its version's manifest has of it, keyed or not.
        topic: The topic that it was published to.
        partition: Its partition there.
        offset: Its offset there.
        published_at: When the broker took it; None where its text is erased.
        version: The version whose update learned it or refused to.
        seq: That version's position in the adapter's history.
        outcome: The gate's decision on that version: `promoted` or `refused`.
        gate_before_nats: Loss on held-out examples before that update, in nats per token.
        gate_after_nats: The same after it.
        state: `live`: the live version was trained on it; `learned`: another version that may be served was;
            `not learned`: none was; `quarantined`: it is to be forgotten; `held`: a legal hold covers it; `erased`: its
            text is deleted.
        expires_at: When it will be forgotten; None: never.
    """

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
    """Print the adapter's examples, those of the newest version first.

    Args:
        adapter: The adapter.
        document: Only examples of this document or interaction.
        limit: How many examples the table shows.
        as_json: Print JSON with all examples.

    Raises:
        NotFoundError: The adapter has no version, or the document is none of its examples.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    examples = _explain(registry, adapter, settings.serving.alias, document)
    if document is not None and not examples:
        raise NotFoundError(
            "no such document in this adapter", got=document,
            allowed="a document whose text the store has; of an erased one only topic, partition and offset remain",
            remedy="run the command without --document to list all examples",
        )  # fmt: skip
    shown = [_with_losses(registry, adapter, item) for item in (examples if as_json else examples[:limit])]
    if as_json:
        print(json.dumps([asdict(example) for example in shown]))
        return 0
    console = Console()
    console.print(Text(printable(_title(adapter, examples)), "bold"), soft_wrap=True)
    print_table(_COLUMNS, [_row(example) for example in shown], console=console)
    if len(examples) > limit:
        Console(stderr=True).print(f"… and {len(examples) - limit} more: --limit, or --json for all", soft_wrap=True)
    return 0


def _title(adapter: str, examples: Sequence[ExplainedExample]) -> str:
    erased = sum(example.state == _ERASED for example in examples)
    stored = len(examples) - erased
    return f"{adapter}: {stored} example{'' if stored == 1 else 's'}" + (f", {erased} erased" if erased else "")


def _row(example: ExplainedExample) -> Row:
    gate = "-"
    if example.gate_before_nats is not None and example.gate_after_nats is not None:
        gate = f"{example.gate_before_nats:.3f} → {example.gate_after_nats:.3f}"
    until = "-" if example.state == _ERASED else _minutes(example.expires_at) or "for ever"
    return (
        example.document_id or "-", f"{example.topic}[{example.partition}]@{example.offset}",
        _minutes(example.published_at) or "-", str(example.seq), example.version, example.outcome, gate,
        Text(example.state, _COLOURS.get(example.state, "")), until,
    )  # fmt: skip


def _minutes(iso: str | None) -> str:
    return (iso or "")[:16].replace("T", " ")


def explain_examples(
    registry: Registry, adapter: str, alias: str, document: str | None = None
) -> list[ExplainedExample]:
    """Return the examples of the adapter that the store has or had, those of the newest version first.

    Args:
        registry: The registry to read.
        adapter: The adapter.
        alias: The alias whose version counts as live.
        document: Only the stored examples of this document or interaction.
    """
    found = _explain(registry, adapter, alias, document)
    return [_with_losses(registry, adapter, example) for example in found]


def _explain(registry: Registry, adapter: str, alias: str, document: str | None) -> list[ExplainedExample]:
    """Return the examples without their losses, which take the manifest of each version."""
    head = registry.head(adapter)
    if head is None:
        return []
    history = history_index(registry, adapter).load(head)
    stored = stored_examples(registry, adapter, history)
    live_ids = _live_example_ids(registry, adapter, alias, history)
    quarantine_filter = QuarantineFilter(load_quarantine(registry.store, adapter), registry.store)
    policies = load_in_force(registry.store).policies_on(adapter)
    wanted = None if document is None else normalize("NFC", document)
    explained = []
    for item in stored:  # a terminal and a producer may write the same id in two forms
        if wanted is None or normalize("NFC", item.example.document_id) == wanted:
            state = _state(item, quarantine_filter, live_ids)
            outcome = history.versions[item.version].outcome
            explained.append(_explained(item, outcome, state, expires_ms(item.example, policies)))
    if wanted is None:  # of an erased document only topic, partition and offset remain
        explained += _all_erased(registry, adapter, history, stored)
    return sorted(explained, key=lambda example: (-example.seq, example.topic, example.partition, example.offset))


def _all_erased(
    registry: Registry, adapter: str, history: IndexedHistory, stored: Sequence[StoredExample]
) -> list[ExplainedExample]:
    """Return the learned examples that are not stored, newest first, with the ids that manifests have of them."""
    ids = ExampleIds.load(registry.store, adapter)
    seen = {form for item in stored for form in ids.forms(item.example.example_id)}
    origins = {
        (origin.partition_key(), origin.leader_epoch, origin.offset)
        for item in stored
        for origin in [item.example.origin]
    }
    erased = []
    for version in reversed(history.published):
        node = history.versions[version]
        if node.learned_count == 0 or (node.batch is not None and history.rows(node.batch)):
            continue  # whatever it learned is stored
        manifest = registry.manifest(adapter, version)
        for learned in manifest.learned:
            example_id = ids.comparable(learned.example_id)
            if example_id not in seen and learned.origin_offset not in origins:
                seen.add(example_id)
                erased.append(_erased(learned.example_id, learned.partition, learned.offset, version, node))
    return erased


def _live_example_ids(registry: Registry, adapter: str, alias: str, history: IndexedHistory) -> set[str]:
    """Return the ids of the stored examples that the live version was trained on."""
    state = registry.alias(adapter, alias)
    version = state.version if state and state.kind != "retired" else None
    promoted: list[IndexedVersion] = []
    while version is not None and version in history.versions:
        node = history.versions[version]
        if node.outcome == "promoted":
            promoted.append(node)
        version = node.parent
    return set[str]().union(*learned_ids(registry, adapter, history, promoted).values())


def _state(item: StoredExample, quarantine_filter: QuarantineFilter, live_ids: set[str]) -> str:
    if quarantine_filter.entry_of(item.example) is not None:
        return "quarantined"
    if quarantine_filter.held_by(item.example) is not None:
        return "held"
    if item.example.example_id in live_ids:
        return "live"
    return "learned" if item.learned else "not learned"


def _with_losses(registry: Registry, adapter: str, example: ExplainedExample) -> ExplainedExample:
    if example.state == _ERASED:
        return example
    gate = registry.manifest(adapter, example.version).gate
    return replace(example, gate_before_nats=gate.held_out_before, gate_after_nats=gate.held_out_after)


def _explained(item: StoredExample, outcome: str, state: str, end_ms: int | None) -> ExplainedExample:
    example, origin = item.example, item.example.origin
    return ExplainedExample(
        document_id=example.document_id, example_id=example.example_id, topic=origin.topic,
        partition=origin.partition, offset=origin.offset, published_at=iso_time(origin.timestamp_ms),
        version=item.version, seq=item.seq, outcome=outcome, gate_before_nats=None, gate_after_nats=None, state=state,
        expires_at=None if end_ms is None else iso_time(end_ms),
    )  # fmt: skip


def _erased(
    example_id: str, origin_partition: str, offset: int, version: str, node: IndexedVersion
) -> ExplainedExample:
    _, topic, partition = origin_partition.rsplit("/", 2)
    return ExplainedExample(
        document_id=None, example_id=example_id, topic=topic, partition=int(partition), offset=offset,
        published_at=None, version=version, seq=node.seq, outcome=node.outcome, gate_before_nats=None,
        gate_after_nats=None, state=_ERASED, expires_at=None,
    )  # fmt: skip
