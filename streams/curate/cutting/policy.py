"""The bounds of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from perennial.streams.curate.cutting.waiting import MAX_AGES
from perennial.streams.curate.detectors import LOSS_THRESHOLD
from perennial.streams.settings import Settings


@dataclass(frozen=True)
class CutPolicy:
    """The bounds of a micro-batch.

    Attributes:
        max_tokens: pending tokens that cut a micro-batch.
        max_examples: pending examples that cut a micro-batch.
        min_examples: pending examples below which drift does not cut.
        max_age_ms: age of the oldest pending delivery that cuts a micro-batch, in milliseconds.
        cooldown_examples: examples after a new live version in which drift does not cut.
        window: values per signal that are kept to rebuild its drift detectors.
        drift_threshold: standard errors from which a change of a loss is drift.
        drift_patience: updates without a gain from which drift needs more pending examples to cut.
        min_tokens: pending tokens below which age does not cut before `MAX_AGES` times `max_age_ms`, unless a person
            corrected something; 0: age alone decides.
    """

    max_tokens: int
    max_examples: int
    min_examples: int
    max_age_ms: int
    cooldown_examples: int
    window: int
    drift_threshold: float = LOSS_THRESHOLD
    drift_patience: int = 3
    min_tokens: int = 0

    @classmethod
    def of(cls, settings: Settings) -> CutPolicy:
        """Return the policy that the settings describe."""
        return cls(
            settings.curate.max_batch_tokens,
            settings.curate.max_batch_examples,
            settings.curate.min_batch_examples,
            int(settings.curate.max_age_s * 1000),
            settings.curate.cooldown_examples,
            settings.curate.detector_window,
            settings.curate.drift_threshold,
            settings.curate.drift_patience_updates,
            settings.curate.min_batch_tokens,
        )

    def age_cuts(self, waited_ms: int, tokens: int, *, corrected: bool) -> bool:
        """Return whether pending examples have waited long enough.

        Args:
            waited_ms: how long the oldest pending delivery has waited, in milliseconds.
            tokens: pending tokens.
            corrected: whether a correction of a person is pending.
        """
        small = tokens < self.min_tokens and not corrected
        return waited_ms >= self.max_age_ms * (MAX_AGES if small else 1)
