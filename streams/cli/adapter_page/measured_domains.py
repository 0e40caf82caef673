"""Measure stored examples of each domain under several versions of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from perennial.extras import require_extra
from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.keys import blob_key
from perennial.storage.objects.object_store import get_blob
from perennial.storage.registry.history.collected import load_collected
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry
from perennial.streams.cli.adapter_page.adapter_history import MeasuredLosses, all_stored, domain_of
from perennial.streams.cli.base.base_rows import reporter
from perennial.streams.cli.example_counts import COUNTED_VERSIONS
from perennial.streams.events.models import Batch, ExampleAccepted
from perennial.streams.settings import Settings

MEASURED_DOMAINS, MEASURED_EXAMPLES, MEASURED_VERSIONS = 12, 16, 10


def measure_domains(settings: Settings, registry: Registry, adapter: str) -> MeasuredLosses | None:
    """Return the mean loss of each domain under the frozen base and under promoted versions, evenly spread.

    Args:
        settings: Name the base, which must be the adapter's.
        registry: The registry to read.
        adapter: The adapter.

    Returns:
        The losses; None where the store has neither examples nor weights to measure.

    Raises:
        MissingExtraError: The extra `worker` is not installed.
        AdapterError: The adapter belongs to another base or rank.
        BaseModelError: The base cannot be loaded.
    """
    require_extra("worker", "`perennial adapters report --measure`")
    promoted = _promoted(registry, adapter)
    examples = _examples_by_domain(registry, adapter)
    if not promoted or not examples:
        return None
    report = reporter()
    report(f"loading {settings.model.base}")
    from perennial.learner.serving.evaluate import Evaluator

    evaluator = Evaluator(settings, registry.store)
    columns, by_column = [], []
    for manifest in (None, *_spread(promoted)):
        name = "the frozen base" if manifest is None else f"version {manifest.seq}"
        report(f"measuring {len(examples)} domains under {name}")
        columns.append(0 if manifest is None else manifest.seq)
        by_column.append(evaluator.example_losses(manifest, list(examples.values())))
    nats = [[column[row] for column in by_column] for row in range(len(examples))]
    return MeasuredLosses(list(examples), columns, nats, {name: len(group) for name, group in examples.items()})


def _promoted(registry: Registry, adapter: str) -> list[Manifest]:
    """Return the promoted versions that still have weights, oldest first."""
    collected = load_collected(registry.store, adapter).all
    found = []
    for _, version in registry.versions(adapter, newest_first=True, limit=COUNTED_VERSIONS):
        try:
            manifest = registry.manifest(adapter, version)
        except (NotFoundError, IntegrityError):
            continue
        if manifest.outcome != "promoted" or version in collected:
            continue
        if registry.store.exists(blob_key(manifest.weights.digest)):  # a forgetting deletes weights too
            found.append(manifest)
    return found[::-1]


def _spread(promoted: Sequence[Manifest]) -> list[Manifest]:
    """Return at most `MEASURED_VERSIONS`, evenly spread, the first and the last among them."""
    if len(promoted) <= MEASURED_VERSIONS:
        return list(promoted)
    last = len(promoted) - 1
    return [promoted[round(number * last / (MEASURED_VERSIONS - 1))] for number in range(MEASURED_VERSIONS)]


def _examples_by_domain(registry: Registry, adapter: str) -> dict[str, list[ExampleAccepted]]:
    """Return stored examples that were learned, with their texts: for each domain some, evenly spread over time."""
    wanted: dict[str, list[tuple[str, str]]] = {}
    for item in all_stored(registry, adapter):
        if item.learned and item.example.learn:
            wanted.setdefault(domain_of(item), []).append((item.version, item.example.example_id))
    found: dict[str, list[ExampleAccepted]] = {}
    for domain, places in list(wanted.items())[:MEASURED_DOMAINS]:
        step = max(1, len(places) // MEASURED_EXAMPLES)
        for version, example_id in places[::step][:MEASURED_EXAMPLES]:
            found.setdefault(domain, []).extend(_examples_of(registry, adapter, version, example_id))
    return {domain: examples for domain, examples in found.items() if examples}


def _examples_of(registry: Registry, adapter: str, version: str, example_id: str) -> list[ExampleAccepted]:
    """Return the example, if its micro-batch is still stored and readable; micro-batches are read one at a time."""
    try:
        manifest = registry.manifest(adapter, version)
        body = get_blob(registry.store, manifest.batch.digest) if manifest.batch else b""
        batch = Batch.model_validate_json(body) if body else None
    except (NotFoundError, IntegrityError, ValidationError):  # erased meanwhile, or damaged
        return []
    return [example for example in batch.examples if example.example_id == example_id] if batch else []
