"""Gather what the store has of an adapter's history, for its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.collected import load_collected
from perennial.storage.registry.history.example_ids import ExampleIds
from perennial.storage.registry.history.update_costs import load_costs
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.parked import load_parked
from perennial.storage.registry.registry import Registry
from perennial.storage.registry.waiting_jobs import list_jobs
from perennial.streams.cli.example_counts import COUNTED_VERSIONS, ExampleCounts, counted_examples
from perennial.streams.retain.example_index import stored_examples
from perennial.streams.retain.ledger import StoredExample
from perennial.streams.retention.example_rows import history_index

UNKNOWN_DOMAIN = "erased or unknown"
"""Domain of an update whose examples the store no longer has."""
DRIFT = "drift"


@dataclass(frozen=True)
class HistoryVersion:
    """One version, as its manifest describes it.

    Attributes:
        seq: Sequence number.
        version: Its id.
        kind: What made it.
        outcome: The gate's verdict.
        reason: Why.
        examples: Number of examples that it learned, or that the gate refused.
        tokens: Trained tokens.
        gate: What the gate measured.
        general_limit_nats: Allowed rise of the general loss, if the recipe names it.
        domain: Commonest domain of its examples.
        domains: Number of its stored examples by domain.
        live: The alias points at it.
        collected: Its weights were deleted.
    """

    seq: int
    version: str
    kind: str
    outcome: str
    reason: str
    examples: int
    tokens: int
    gate: GateFigures
    general_limit_nats: float | None
    domain: str
    domains: Mapping[str, int]
    live: bool
    collected: bool

    @property
    def general_rise_nats(self) -> float | None:
        """By how much the general loss is above the frozen base's."""
        after, base = self.gate.anchor_after, self.gate.anchor_base
        return None if after is None or base is None else after - base

    @property
    def cut_by_drift(self) -> bool:
        """Whether drift cut its micro-batch. The manifest of a refused version names the refusal instead."""
        return self.kind == "update" and self.reason == DRIFT


@dataclass(frozen=True)
class MeasuredLosses:
    """Losses that the command measured: the matrix R of continual learning.

    Attributes:
        domains: Domains, in the order in which they were first learned.
        columns: Sequence numbers of the versions; 0 is the frozen base.
        nats: Mean loss per token by domain and column.
        examples: Number of examples that were measured, by domain.
    """

    domains: Sequence[str]
    columns: Sequence[int]
    nats: Sequence[Sequence[float]]
    examples: Mapping[str, int]


@dataclass(frozen=True)
class AdapterHistory:
    """Everything on the page.

    Attributes:
        adapter: Name of the adapter.
        base: Name of its base.
        base_sha256: Digest of its base.
        generation: Generation of the alias; 0 if it was never set.
        live: The version that the alias points at.
        live_since: ISO 8601 time since when.
        parked: Why the adapter waits for an operator; empty if it does not.
        jobs_waiting: Update jobs that wait.
        versions: The newest versions, oldest first.
        earlier_versions: Number of versions before these, which the page does not show.
        counts: What became of the examples.
        device_seconds: Recorded time of the device for updates; None where none is recorded.
        measured: Losses that were measured for the page, if any.
    """

    adapter: str
    base: str
    base_sha256: str
    generation: int
    live: str | None
    live_since: str | None
    parked: str
    jobs_waiting: int
    versions: Sequence[HistoryVersion]
    earlier_versions: int
    counts: ExampleCounts
    device_seconds: float | None = None
    measured: MeasuredLosses | None = field(default=None)

    @property
    def domains(self) -> list[str]:
        """Domains of the updates, in the order in which they came."""
        return list(dict.fromkeys(version.domain for version in self.versions if version.kind == "update"))


def domain_of(item: StoredExample) -> str:
    """Return the domain of an example: as its publisher named it, or else its source, or else its kind."""
    return item.example.domain or item.example.source or f"{item.example.kind}s without a domain"


def all_stored(registry: Registry, adapter: str) -> list[StoredExample]:
    """Return the examples whose text the store has, oldest first."""
    head = registry.head(adapter)
    if head is None:
        return []
    return stored_examples(registry, adapter, history_index(registry, adapter).load(head))


def adapter_history(registry: Registry, adapter: str, alias: str) -> AdapterHistory:
    """Gather an adapter's history; versions that cannot be read are left out.

    Args:
        registry: The registry to read.
        adapter: An adapter that has a version.
        alias: The alias whose version counts as live.

    Raises:
        StoreError: The store cannot be read.
    """
    head = registry.head(adapter)
    assert head is not None
    state = registry.alias(adapter, alias)
    live = state.version if state is not None and state.kind != "retired" else None
    collected = load_collected(registry.store, adapter).all
    # By example and not by version: after a forgetting the micro-batches belong to rebuilt versions.
    ids = ExampleIds.load(registry.store, adapter)
    domains = {
        form: domain_of(item) for item in all_stored(registry, adapter) for form in ids.forms(item.example.example_id)
    }
    versions: list[HistoryVersion] = []
    newest = list(registry.versions(adapter, newest_first=True, limit=COUNTED_VERSIONS))
    for _, version in newest:
        try:
            manifest = registry.manifest(adapter, version)
        except (NotFoundError, IntegrityError):  # collected meanwhile, or damaged
            continue
        versions.append(_version(manifest, version, domains, live=version == live, collected=version in collected))
    parked = load_parked(registry.store, adapter)
    return AdapterHistory(
        adapter=adapter,
        base=head.manifest.base_model,
        base_sha256=head.manifest.base_sha256,
        generation=state.generation if state else 0,
        live=live,
        live_since=state.published_at.isoformat(timespec="seconds") if state and live else None,
        parked=f"{parked.reason}: {parked.detail}" if parked else "",
        jobs_waiting=len(list(list_jobs(registry.store, adapter))),
        versions=versions[::-1],
        earlier_versions=newest[-1][0] - 1 if newest else 0,
        counts=counted_examples(registry, adapter),
        device_seconds=_device_seconds(registry, adapter),
    )


def _version(
    manifest: Manifest, version: str, known: Mapping[str, str], *, live: bool, collected: bool
) -> HistoryVersion:
    refused = [item for item in manifest.skipped if manifest.outcome == "refused" and item.reason == manifest.reason]
    tried = [item.example_id for item in manifest.learned] or [item.example_id for item in refused]
    domains = Counter(known[example_id] for example_id in tried if example_id in known)
    limit = manifest.config.get("max_general_rise_nats")
    return HistoryVersion(
        seq=manifest.seq,
        version=version,
        kind=manifest.kind,
        outcome=manifest.outcome,
        reason=manifest.reason,
        examples=len(tried),
        tokens=manifest.tokens,
        gate=manifest.gate,
        general_limit_nats=float(limit) if isinstance(limit, int | float) else None,
        domain=domains.most_common(1)[0][0] if domains else UNKNOWN_DOMAIN,
        domains=dict(domains),
        live=live,
        collected=collected,
    )


def _device_seconds(registry: Registry, adapter: str) -> float | None:
    try:
        costs = load_costs(registry.store, adapter).updates
    except IntegrityError:
        return None
    return sum(cost.seconds for cost in costs) if costs else None
