"""Take the corrections out of an update that others outvote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.thinning.contradictions import OUTVOTED, outvoted
from perennial.storage.registry.manifest import Manifest
from perennial.streams.events.models import ExampleAccepted

NO_TEXT_ON_BASE = "no-text-on-base"
"""The reason with which a rebase skips an example that the old base learned and the new one finds nothing to train in."""


def reasons_not_learned(manifest: Manifest) -> frozenset[str]:
    """Return the reasons with which an update skipped examples that it was given to train: the vote's, the base's, and the gate's.

    Such examples may be published again, and a rebuild decides about them anew.
    """
    always = {OUTVOTED, NO_TEXT_ON_BASE}
    return frozenset(always | {manifest.reason} if manifest.outcome == "refused" else always)


@dataclass(frozen=True)
class Vote:
    """The examples of an update after the vote.

    Attributes:
        trained: Those to train, in their order.
        outvoted: Those whose answer is outvoted, in their order.
        missing: Earlier examples that were not counted, because they were erased or are quarantined. Part of the update's
            identity: without it, an update that counted an example would have the id of one that did not.
    """

    trained: list[ExampleAccepted]
    outvoted: list[ExampleAccepted]
    missing: int = 0


def vote(
    recipe: Recipe,
    examples: Sequence[ExampleAccepted],
    index: Iterable[ReplayEntry],
    example_of: Callable[[ReplayEntry], ExampleAccepted | None],
) -> Vote:
    """Decide which corrections of an update are trained.

    Args:
        recipe: Who votes: nobody, the examples of the update, or the earlier ones of the replay index as well.
        examples: Examples of the update.
        index: Replay index that the update starts from.
        example_of: Returns an earlier example; None if it must not be used.
    """
    if recipe.correction_votes == "off" or all(example.kind != "correction" for example in examples):
        return Vote(list(examples), [])
    earlier = [example_of(entry) for entry in index] if recipe.correction_votes == "history" else []
    losers = outvoted(examples, [example for example in earlier if example is not None])
    return Vote(
        [example for example in examples if example.example_id not in losers],
        [example for example in examples if example.example_id in losers],
        earlier.count(None),
    )
