"""Read what an adapter's updates trained and cost, and which examples it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.objects.object_store import get_blob
from perennial.storage.objects.safetensors_check import safetensors_shapes
from perennial.storage.registry.history.example_ids import ExampleIds
from perennial.storage.registry.history.update_costs import UpdateCost, load_costs
from perennial.storage.registry.manifest import LearnedExample, Manifest
from perennial.storage.registry.registry import Head, Registry
from perennial.streams.cli.example_counts import COUNTED_VERSIONS


@dataclass(frozen=True)
class TrainedUpdate:
    """One update that trained something.

    Attributes:
        version: The version that it made.
        manifest: The version's manifest.
        cost: What the learner recorded of it; None where it did not.
    """

    version: str
    manifest: Manifest
    cost: UpdateCost | None


def trained_updates(registry: Registry, adapter: str) -> list[TrainedUpdate]:
    """Return the updates among the newest versions, oldest first; unreadable ones are left out."""
    try:
        recorded = {cost.version: cost for cost in load_costs(registry.store, adapter).updates}
    except IntegrityError:
        recorded = {}
    found = []
    for _, version in registry.versions(adapter, newest_first=True, limit=COUNTED_VERSIONS):
        try:
            manifest = registry.manifest(adapter, version)
        except (NotFoundError, IntegrityError):  # collected meanwhile, or damaged
            continue
        if manifest.tokens:
            found.append(TrainedUpdate(version, manifest, recorded.get(version)))
    return found[::-1]


def held_examples(registry: Registry, head: Head) -> list[list[LearnedExample]]:
    """Return the examples that the newest version holds, by the update that learned them, oldest first.

    Only the updates of its schedule count: what was forgotten, rolled back or refused is not in it. An example that was
    learned again counts once, with its last update.
    """
    ids = ExampleIds.load(registry.store, head.manifest.adapter)
    seen: set[str] = set()
    groups: list[list[LearnedExample]] = []
    for manifest in _schedule(registry, head):
        names = [ids.comparable(example.example_id) for example in manifest.learned]
        new = [example for example, name in zip(manifest.learned, names, strict=True) if name not in seen]
        seen.update(names)
        if new:
            groups.append(new)
    return groups[::-1]


def _schedule(registry: Registry, head: Head) -> Iterator[Manifest]:
    """Yield the versions that led to the newest one, newest first."""
    version: str | None = head.version
    for _ in range(COUNTED_VERSIONS):
        if version is None:
            return
        try:
            manifest = registry.manifest(head.manifest.adapter, version)
        except (NotFoundError, IntegrityError):
            return
        yield manifest
        version = manifest.schedule_parent


def weight_shapes(registry: Registry, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a version's weights, by the names of PEFT's files.

    Raises:
        NotFoundError: The weights were collected.
        IntegrityError: They are damaged.
    """
    return safetensors_shapes(get_blob(registry.store, manifest.weights.digest))
