"""Which earlier examples an adapter keeps for replay, and which rows each optimizer step is made of.

Pure: the kept set depends only on which examples were learned, not on their order, so that leaving one out of the
past gives exactly the set of a run that never saw it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import orjson

from perennial.learner.model.tokenization import TokenRow
from perennial.storage.errors import IntegrityError

MAX_INDEX_BYTES = 64 * 1024**2
MORE_STEPS = 3


@dataclass(frozen=True, order=True, slots=True)
class ReplayEntry:
    """An example that may be replayed, and the micro-batch blob that holds its text."""

    example_id: str
    batch: str


@dataclass(frozen=True)
class BatchComposition:
    """Of what a step consists: rows per step, the shares of them that are replayed and general, and steps at least."""

    steps: int
    rows: int
    replay_share: float
    general_share: float


@dataclass(frozen=True)
class TrainingSchedule:
    """The rows of every step, and how many replay draws found their text erased."""

    steps: tuple[tuple[TokenRow, ...], ...]
    replayed: int
    missing: int


def seeded_random(*parts: object) -> random.Random:
    """A generator that follows from the parts alone, on every machine."""
    return random.Random(sha256(orjson.dumps(parts)).digest())  # noqa: S311 - repeatable on purpose


def update_replay_index(
    index: Iterable[ReplayEntry], new: Iterable[ReplayEntry], size: int, seed: int
) -> tuple[ReplayEntry, ...]:
    """The `size` examples with the smallest hash of (seed, id), sorted by id: a bottom-k sample (Cohen 1997)."""
    by_id = {kept.example_id: kept for kept in (*index, *new)}
    chosen = sorted(by_id, key=lambda example_id: sha256(f"{seed}:{example_id}".encode()).digest())[:size]
    return tuple(by_id[example_id] for example_id in sorted(chosen))


def index_to_bytes(index: Sequence[ReplayEntry]) -> bytes:
    """The index as canonical JSON: the same examples give the same bytes."""
    return orjson.dumps([{"batch": kept.batch, "example_id": kept.example_id} for kept in index])


def index_from_bytes(data: bytes) -> tuple[ReplayEntry, ...]:
    """A stored index. Raises IntegrityError where the bytes are not one."""
    if len(data) > MAX_INDEX_BYTES:
        raise IntegrityError("a replay index is too large", got=len(data), allowed=MAX_INDEX_BYTES)
    try:
        entries = orjson.loads(data)
        index = tuple(ReplayEntry(str(entry["example_id"]), str(entry["batch"])) for entry in entries)
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
    rows_of: Callable[[ReplayEntry], Sequence[TokenRow] | None],
    general: Callable[[random.Random], TokenRow | None],
    mix: BatchComposition,
    rng: random.Random,
) -> TrainingSchedule:
    """Draw the rows of each step: new ones in shuffled passes, each at least once, with replayed and general beside.

    `rows_of` gives an earlier example's rows, None where its text was erased. A small batch shrinks the step
    instead of repeating a row within it, and the shares with it, and takes up to three times the steps: a single
    correction must show after an update or a few. Where nothing was learned before, new rows take the place of replay.
    """
    if not new:
        return TrainingSchedule((), 0, 0)
    want_general = mix.rows * mix.general_share
    want_replay = min(mix.rows * mix.replay_share, float(len(index)))
    full = max(1, round(mix.rows - want_general - want_replay))
    per_step = min(len(new), full)
    scale = per_step / max(1.0, mix.rows - want_general - want_replay)
    replay_rows = _at_least_one(want_replay, scale)
    general_rows = _at_least_one(want_general, scale)
    count = max(mix.steps * min(MORE_STEPS, full // per_step), -(-len(new) // per_step))
    draws = _draws(index, rows_of, replay_rows * count, rng)
    replayed = [row for row in draws if row is not None]
    passes = _passes(new, per_step * count, rng)
    steps = []
    for step in range(count):
        rows = list(passes[step * per_step : (step + 1) * per_step])
        rows += replayed[step * replay_rows : (step + 1) * replay_rows]
        rows += [row for row in (general(rng) for _ in range(general_rows)) if row is not None]
        steps.append(tuple(rows))
    return TrainingSchedule(tuple(steps), len(replayed), len(draws) - len(replayed))


def _at_least_one(rows: float, scale: float) -> int:
    return max(1, round(rows * scale)) if rows > 0 else 0


def _passes(rows: Sequence[TokenRow], wanted: int, rng: random.Random) -> list[TokenRow]:
    passes: list[TokenRow] = []
    while len(passes) < wanted:
        passes += rng.sample(rows, len(rows))
    return passes[:wanted]


def _draws(
    index: Sequence[ReplayEntry],
    rows_of: Callable[[ReplayEntry], Sequence[TokenRow] | None],
    wanted: int,
    rng: random.Random,
) -> list[TokenRow | None]:
    draws: list[TokenRow | None] = []
    while index and len(draws) < wanted:
        for kept in rng.sample(index, min(len(index), wanted - len(draws))):
            rows = rows_of(kept)
            draws.append(rng.choice(rows) if rows else None)
    return draws
