"""Store the replay index, the list of earlier examples that an adapter may replay, and draw the rows of each optimizer step.

Pure functions. `replay.places` decides which examples are in the index.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import orjson

from perennial.learner.model.tokenization import TokenRow
from perennial.storage.errors import IntegrityError

MAX_INDEX_BYTES = 64 * 1024**2
_OPTIONAL_FIELDS = ("document", "place", "text_bytes")
MAX_STEP_FACTOR = 3
"""A micro-batch that is too small to fill a step is trained in up to so many times the steps."""

MAX_EPOCH_STEPS = 256
"""Further passes over the new rows end here, so that a long document does not hold an adapter up for an hour."""

RowsOf = Callable[["ReplayEntry"], Sequence[TokenRow] | None]
"""Returns the rows of an earlier example; None where it must not be replayed, because it was erased or is quarantined."""


@dataclass(frozen=True, order=True, slots=True)
class ReplayEntry:
    """An earlier example that may be replayed.

    Attributes:
        example_id: Id of the example.
        batch: Digest of the micro-batch blob that holds its text.
        document: Key of its document, see `replay.places`; empty where the recipe gives places to examples.
        place: Key of the document whose place it has taken; empty where it has its own.
        text_bytes: Bytes of its text; 0 where nobody counts them.
    """

    example_id: str
    batch: str
    document: str = ""
    place: str = ""
    text_bytes: int = 0


@dataclass(frozen=True)
class BatchComposition:
    """The wanted composition of the steps of an update.

    Attributes:
        steps: Least number of optimizer steps.
        rows: Rows of a full step.
        replay_share: Share of a full step that is replayed, 0 to 1.
        general_share: Share of a full step that is general text, 0 to 1.
        epochs: Least number of passes over the new rows, in at most `MAX_EPOCH_STEPS` steps.
        question_dropout: Share of the tokens of each question that are left out, other ones each time, 0 to 1.
        saved: Share of the tokens of the new rows that are not trained, 0 to below 1. There are more steps in exchange, at
            most `MAX_STEP_FACTOR` times as many, so that an update trains about as many tokens.
    """

    steps: int
    rows: int
    replay_share: float
    general_share: float
    epochs: int = 1
    question_dropout: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True)
class TrainingSchedule:
    """The rows to train on.

    Attributes:
        steps: Rows of each optimizer step.
        replayed: Number of replayed rows over all steps.
        missing: Number of replay draws that gave no row, because the example was erased or is quarantined.
    """

    steps: tuple[tuple[TokenRow, ...], ...]
    replayed: int
    missing: int


@dataclass(frozen=True)
class _StepCounts:
    """The number of steps, and the number of rows of each kind in one step."""

    steps: int
    new: int
    replayed: int
    general: int


def seeded_random(*parts: object) -> random.Random:
    """Return a random generator that depends on the parts alone, on every machine.

    Args:
        parts: JSON values.
    """
    return random.Random(sha256(orjson.dumps(parts)).digest())  # noqa: S311 - repeatable on purpose


def index_to_bytes(index: Sequence[ReplayEntry]) -> bytes:
    """Serialise a replay index to canonical JSON: equal entries give equal bytes.

    Hazard: forgetting compares these bytes with recorded ones, so fields that an entry does not use are left out.
    """
    return orjson.dumps(
        [
            {"batch": entry.batch, "example_id": entry.example_id}
            | {name: value for name in _OPTIONAL_FIELDS if (value := getattr(entry, name))}
            for entry in index
        ]
    )


def index_from_bytes(data: bytes) -> tuple[ReplayEntry, ...]:
    """Read a stored replay index.

    Raises:
        IntegrityError: The bytes are not a replay index, or more than `MAX_INDEX_BYTES`.
    """
    if len(data) > MAX_INDEX_BYTES:
        raise IntegrityError("a replay index is too large", got=len(data), allowed=MAX_INDEX_BYTES)
    try:
        entries = orjson.loads(data)
        index = tuple(
            ReplayEntry(
                str(entry["example_id"]), str(entry["batch"]), str(entry.get("document", "")),
                str(entry.get("place", "")), int(entry.get("text_bytes", 0)),
            )
            for entry in entries
        )  # fmt: skip
        if type(entries) is not list:
            raise TypeError(type(entries).__name__)  # noqa: TRY301 - one way out for all that is not an index
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(
            "a replay index does not parse",
            got=str(error),
            allowed="a list of example_id and batch",
            remedy="restore the object from a backup",
        ) from error
    return tuple(sorted(index))


def build_schedule(
    new: Sequence[TokenRow],
    index: Sequence[ReplayEntry],
    rows_of: RowsOf,
    general: Callable[[random.Random], TokenRow | None],
    composition: BatchComposition,
    rng: random.Random,
) -> TrainingSchedule:
    """Draw the rows of every step: new rows in shuffled passes, each at least `epochs` times, and replayed and general rows.

    Where the micro-batch has too few rows for a full step, every step gets smaller: no row comes twice in a step, and
    there are fewer replayed and general rows in proportion. In exchange there are up to `MAX_STEP_FACTOR` times as many
    steps, because even a single correction must show after an update or a few. Where nothing was learned before, new
    rows take the place of the replayed ones.

    Args:
        new: Rows of the micro-batch; without any the schedule is empty.
        index: Earlier examples to draw from.
        rows_of: Returns the rows of an earlier example, None where it must not be replayed.
        general: Draws one row of general text, None where there is none.
        composition: Wanted steps, rows and shares.
        rng: Random generator. The order of the draws (replayed, new, then step by step the words of questions to leave
            out and general rows) is part of the recipe.
    """
    if not new:
        return TrainingSchedule((), 0, 0)
    counts = _step_counts(len(new), len(index), composition)
    draws = _draw_replayed(index, rows_of, counts.replayed * counts.steps, rng)
    replayed = [row for row in draws if row is not None]
    new_rows = _shuffled_passes(new, counts.new * counts.steps, rng)
    steps = []
    for step in range(counts.steps):
        rows = list(new_rows[step * counts.new : (step + 1) * counts.new])
        rows += replayed[step * counts.replayed : (step + 1) * counts.replayed]
        if composition.question_dropout > 0:
            rows = [drop_words(row, composition.question_dropout, rng) for row in rows]
        rows += [row for row in (general(rng) for _ in range(counts.general)) if row is not None]
        steps.append(tuple(rows))
    return TrainingSchedule(tuple(steps), len(replayed), len(draws) - len(replayed))


def drop_words(row: TokenRow, share: float, rng: random.Random) -> TokenRow:
    """Return a row whose question lacks some of its tokens; a question is never left without any.

    The answer is then learned for other wordings of the question too. Random deletion is one of the operations of EDA
    (Wei and Zou 2019, arXiv 1901.11196).

    Args:
        row: The row.
        share: Probability that a token of the question is left out, 0 to 1.
        rng: Random generator, from which one number is drawn for each token of the question.
    """
    start, end = row.question
    kept = tuple(token for token in row.ids[start:end] if rng.random() >= share)
    if not kept:
        return row
    return replace(
        row,
        ids=(*row.ids[:start], *kept, *row.ids[end:]),
        train_from=row.train_from - (end - start - len(kept)),
        question=(start, start + len(kept)),
    )


def _step_counts(new_rows: int, index_size: int, composition: BatchComposition) -> _StepCounts:
    """Turn shares into row counts, smaller in proportion where there are too few new rows for a full step."""
    full_general = composition.rows * composition.general_share
    full_replayed = min(composition.rows * composition.replay_share, float(index_size))
    rest = composition.rows - full_general - full_replayed
    full_new = max(1, round(rest))
    new = min(new_rows, full_new)
    scale = new / max(1.0, rest)
    least_for_all = -(-new_rows // new)
    for_epochs = min(-(-new_rows * composition.epochs // new), MAX_EPOCH_STEPS)
    steps = max(composition.steps * min(MAX_STEP_FACTOR, full_new // new), least_for_all, for_epochs)
    replayed, general = _at_least_one(full_replayed, scale), _at_least_one(full_general, scale)
    trained_share = 1 - composition.saved * new / (new + replayed + general)
    return _StepCounts(math.ceil(steps * min(MAX_STEP_FACTOR, 1 / trained_share)), new, replayed, general)


def _at_least_one(rows: float, scale: float) -> int:
    """Return the scaled number of rows, at least 1 unless none are wanted."""
    return max(1, round(rows * scale)) if rows > 0 else 0


def _shuffled_passes(rows: Sequence[TokenRow], wanted: int, rng: random.Random) -> list[TokenRow]:
    """Return the first `wanted` rows of shuffled passes over all rows."""
    passes: list[TokenRow] = []
    while len(passes) < wanted:
        passes += rng.sample(rows, len(rows))
    return passes[:wanted]


def _draw_replayed(
    index: Sequence[ReplayEntry], rows_of: RowsOf, wanted: int, rng: random.Random
) -> list[TokenRow | None]:
    """Draw `wanted` rows of earlier examples, each example once before any is drawn again.

    None stands for an example that must not be replayed.
    """
    draws: list[TokenRow | None] = []
    while index and len(draws) < wanted:
        for entry in rng.sample(index, min(len(index), wanted - len(draws))):
            rows = rows_of(entry)
            draws.append(rng.choice(rows) if rows else None)
    return draws
