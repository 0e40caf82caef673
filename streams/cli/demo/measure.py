"""Measure stored versions of an adapter on texts that it was not shown, while the rest of the demo goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from perennial.storage.objects.factory import open_store
from perennial.storage.registry.manifest import Manifest
from perennial.streams.settings import Settings

CURVE_POINTS = 7

Losses = dict[int, dict[str, float]]
"""Mean loss in nats per token, by number of the promoted version (0: the frozen base) and name of the texts."""


def measured_points(versions: int, change_at: int) -> list[int]:
    """Choose which promoted versions to measure: evenly spread, with the base, the change of domain and the last.

    Args:
        versions: Number of promoted versions; their numbers begin at 1, and 0 is the frozen base.
        change_at: Number of the last version before the change of domain.
    """
    step = max(1, versions // CURVE_POINTS)
    return sorted({0, change_at, versions, *range(0, versions, step)})


def measure_curve(
    settings: Settings,
    promoted: Sequence[Manifest],
    change_at: int,
    texts: Mapping[str, Sequence[str]],
    on_progress: Callable[[float], None],
) -> Losses:
    """Measure some of an adapter's promoted versions.

    Args:
        settings: Settings of the stack; they name the store and the base.
        promoted: Manifests of the promoted versions, in order.
        change_at: Number of the last version before the change of domain.
        texts: Texts by name.
        on_progress: Called with the share that is done.

    Returns:
        The losses of the measured versions.
    """
    from perennial.learner.serving.evaluate import Evaluator

    evaluator = Evaluator(settings, open_store(settings.store.require_uri(), settings.s3))
    points = measured_points(len(promoted), change_at)
    losses: Losses = {}
    for number, point in enumerate(points, start=1):
        manifest = promoted[point - 1] if point else None
        losses[point] = {name: evaluator.loss(manifest, some) for name, some in texts.items()}
        on_progress(number / len(points))
    return losses
