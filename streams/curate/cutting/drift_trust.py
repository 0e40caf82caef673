"""Whether drift of an adapter is worth a micro-batch of its own, by what its last updates learned.

Text that cannot be learned (random tokens, text in a wrong encoding) drifts like any other. Where the gate refused the last
updates, or they gained nothing, drift has to wait for more examples: twice as many with each further such update, up to
those of a full micro-batch, which is cut anyway. One update that was promoted with a gain restores the trust.

Nothing is stored for this. The registry has the outcomes, and they are read only when drift is about to cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from perennial.storage.errors import IntegrityError, NotFoundError
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.registry import Registry

LOOK_BACK: Final = 16
"""Newest versions that are read, at most. After so many updates without a gain every bound is reached."""
GAIN_ERRORS: Final = 2.0
"""Standard errors by which the loss on new text must fall to count as a gain."""
MIN_GAIN_NATS: Final = 0.01
"""Fall of the loss, in nats per token, that it must exceed as well. Random letters fall by less once their frequencies are
learned; docstrings by several times as much."""


def updates_without_gain(manifests: Iterable[Manifest]) -> int:
    """Count the newest updates that learned nothing, up to the first that was promoted with a gain.

    An update learned nothing if the gate refused it, or if the loss on its new text did not fall by more than
    `MIN_GAIN_NATS` and `GAIN_ERRORS` standard errors: the gate passes what chance explains, and every other such update
    would look like a gain. Versions of other kinds, and updates that had nothing to learn, are left out.

    Args:
        manifests: versions of one adapter, newest first.
    """
    count = 0
    for manifest in manifests:
        if manifest.kind != "update" or manifest.outcome == "unchanged":
            continue
        if manifest.outcome == "promoted" and _gained(manifest.gate):
            break
        count += 1
    return count


def _gained(gate: GateFigures) -> bool:
    """Return True if the loss on the new text fell noticeably, and where it was not measured."""
    before, after, error = gate.loss_before, gate.loss_after, gate.loss_error
    return before is None or after is None or before - after > max(MIN_GAIN_NATS, GAIN_ERRORS * (error or 0.0))


def examples_for_drift(without_gain: int, min_examples: int, max_examples: int, patience: int) -> int:
    """Return how many examples must be pending before drift cuts.

    Args:
        without_gain: newest updates in a row that learned nothing.
        min_examples: the number while drift is trusted.
        max_examples: the bound; a micro-batch of so many examples is cut without drift.
        patience: updates without a gain from which the number doubles; it doubles again with each further one.

    Returns:
        From `min_examples` to the larger of both numbers.

    Example:
        >>> [examples_for_drift(count, 8, 256, patience=3) for count in (0, 2, 3, 4, 8, 100)]
        [8, 8, 16, 32, 256, 256]
    """
    doublings = min(max(0, without_gain - patience + 1), max_examples.bit_length())
    return max(min_examples, min(max_examples, min_examples << doublings))


def newest_updates_without_gain(registry: Registry, adapter: str) -> int:
    """Count the newest updates of an adapter that learned nothing, among its last `LOOK_BACK` versions.

    Raises:
        StoreError: the store cannot be read.
    """
    return updates_without_gain(_newest(registry, adapter))


def _newest(registry: Registry, adapter: str) -> Iterator[Manifest]:
    try:
        for _, version in registry.versions(adapter, limit=LOOK_BACK):
            yield registry.manifest(adapter, version)
    except (NotFoundError, IntegrityError):  # collected meanwhile, or damaged: what is known decides
        return
