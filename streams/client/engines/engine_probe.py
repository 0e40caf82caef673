"""Compare what an engine predicts with what the learner recorded, before the engine's version is served."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from perennial.storage.registry.manifest import Manifest
from perennial.streams.client.backend import UnfitVersionError
from perennial.streams.client.engines.engine_api import EngineApi, NextTokens
from perennial.streams.probe_texts import PROBE_TEXTS

TOLERANCE_NATS = 0.15
"""Largest mean difference that is taken for rounding. bf16 in vLLM against fp32 in the learner gave .005 to .021 nats,
the base in place of a random adapter .22 to .38 (docs/serving.md)."""


def compare(name: str, manifest: Manifest, api: EngineApi, tolerance_nats: float = TOLERANCE_NATS) -> float:
    """Compare the engine's next tokens after the probe texts with those that the manifest records.

    Args:
        name: The engine's name of the version.
        manifest: The manifest of the version. Where it records nothing, the answers only have to be finite.
        api: The engine.
        tolerance_nats: Largest allowed mean difference of a text's log-probabilities, in nats.

    Returns:
        The largest mean difference of a text, in nats; 0 where nothing is recorded.

    Raises:
        UnfitVersionError: The engine predicts something else, or numbers that are not finite.
    """
    return check_answers(manifest, api.next_tokens(name, list(texts_to_ask(manifest).values())), tolerance_nats)


def texts_to_ask(manifest: Manifest) -> dict[str, str]:
    """Return the texts that an engine is asked about a version, by name, in the order of the answers."""
    recorded = [text for text in manifest.probes if text in PROBE_TEXTS]
    # The long text would not fit a base of short rows, so it is asked for only where the learner recorded it.
    return {text: PROBE_TEXTS[text] for text in recorded or ["sentence-1"]}


def check_answers(manifest: Manifest, answers: Sequence[NextTokens], tolerance_nats: float = TOLERANCE_NATS) -> float:
    """Compare an engine's next tokens after the texts of `texts_to_ask` with those that the manifest records.

    Args:
        manifest: The manifest of the version.
        answers: What the engine predicts after each text.
        tolerance_nats: Largest allowed mean difference of a text's log-probabilities, in nats.

    Returns:
        The largest mean difference of a text, in nats; 0 where nothing is recorded.

    Raises:
        UnfitVersionError: The engine predicts something else.
    """
    worst = 0.0
    for text, answer in zip(texts_to_ask(manifest), answers, strict=True):
        if text in manifest.probes:
            difference = _mean_difference(manifest.probes[text], answer)
            worst = max(worst, difference)
            if difference > tolerance_nats:
                raise UnfitVersionError(
                    "the engine predicts something else with the version than the learner did",
                    got=f"{difference:.3f} nats in the mean after {text}",
                    allowed=f"{tolerance_nats:g} nats",
                    remedy="check that the engine runs the base, the tokenizer and the number format of the learner",
                )
    return worst


def _mean_difference(recorded: Mapping[str, float], answer: NextTokens) -> float:
    """Return the mean absolute difference over the recorded tokens, in nats.

    A token that the engine does not return is at most as probable as the last one that it does.
    """
    if not recorded or not answer:
        return math.inf if recorded else 0.0
    least = min(answer.values())
    differences = (
        abs(nats - answer[int(token)]) if int(token) in answer else max(0.0, nats - least)
        for token, nats in recorded.items()
    )
    return math.fsum(differences) / len(recorded)
