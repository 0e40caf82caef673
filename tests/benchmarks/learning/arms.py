"""The arms: who learns the stream, and how. Each is a small description; `runs` does what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import torch

from perennial.learner.training.recipe import Recipe
from perennial.streams.settings import Settings, load_settings
from tests.benchmarks.learning.orthogonal import PENALTY_WEIGHT

RATES_FILE: Final = Path(__file__).with_name("rates.json")
"""Learning rates that `--form tune` chose, with the command that did."""
DEFAULT_RATE: Final = 1e-3

Learns = Literal["nothing", "stream", "joint", "cumulative", "retrieval"]


@dataclass(frozen=True)
class Arm:
    """How one arm learns.

    Attributes:
        name: Name in the report.
        changes: Settings by flat names that differ from the defaults of the service.
        learns: `stream`: block after block; `joint`: all blocks shuffled into one; `cumulative`: at the end of each
            block from zero on all blocks so far; `nothing`: the frozen base; `retrieval`: the frozen base with the
            nearest trained document in front.
        gated: False to promote every update, without general pressure and without examples that are held out.
        matched: True to take as many steps as spend the backward tokens that `ours` spent.
        tuned: True to take the learning rate of `RATES_FILE`.
        serviced: True where the service itself learns: a document that was superseded is then not replayed any more.
        reptile: Share of an update's change that is kept (Reptile's outer step); 0: all of it.
        orthogonality: Weight of O-LoRA's penalty; each block then trains a LoRA of its own. None: one LoRA for all blocks.
    """

    name: str
    changes: Mapping[str, str] = field(default_factory=dict)
    learns: Learns = "stream"
    gated: bool = True
    matched: bool = False
    tuned: bool = False
    reptile: float = 0.0
    serviced: bool = False
    orthogonality: float | None = None

    def settings(self, base: str) -> Settings:
        """Return the settings of the service for this arm."""
        changes = dict(self.changes)
        if self.tuned and "learning_rate" not in changes:
            changes["learning_rate"] = str(tuned_rate(base, self.name))
        return load_settings(base=base, env_file=None, **changes)

    def recipe(self, settings: Settings, dtype: torch.dtype | None) -> Recipe:
        """Return the recipe of the settings, with a gate that refuses nothing where the arm has none."""
        recipe = Recipe.of(settings, dtype)
        if self.gated:
            return recipe
        return replace(
            recipe, held_out_share=0.0, anchor_rows=0, min_gain_nats=-1e9, max_general_rise_nats=1e9,
            max_answer_rise_nats=0.0,
        )  # fmt: skip


_PLAIN: Final = {
    "replay_share": "0",
    "general_share": "0",
    "general_kl_weight": "0",
    "slow_average": "0",
    "merge_share": "0",
    "replay_places": "examples",
}
_REPLAY: Final = {**_PLAIN, "replay_share": "0.5"}

OURS: Final = Arm("ours", serviced=True)
ARMS: Final[Mapping[str, Arm]] = {
    arm.name: arm
    for arm in (
        Arm("frozen", learns="nothing"),
        OURS,
        Arm("sequential", _PLAIN, gated=False, matched=True, tuned=True),
        Arm("replay", _REPLAY, gated=False, matched=True, tuned=True),
        Arm("joint", _PLAIN, learns="joint", gated=False, matched=True, tuned=True),
        Arm("replay+ema", {**_REPLAY, "slow_average": "0.8"}, gated=False, matched=True, tuned=True),
        Arm("replay+reptile", _REPLAY, gated=False, matched=True, tuned=True, reptile=0.5),
        Arm("olora", _PLAIN, gated=False, matched=True, tuned=True, orthogonality=PENALTY_WEIGHT),
        Arm("ours-replay", {"replay_share": "0"}, matched=True, serviced=True),
        Arm("ours-general", {"general_share": "0"}, matched=True, serviced=True),
        Arm("ours-gate", gated=False, matched=True, serviced=True),
        Arm("cumulative", _PLAIN, learns="cumulative", gated=False, matched=True, tuned=True),
        Arm("retrieval", learns="retrieval"),
    )
}
SHORT: Final = ("frozen", "sequential", "replay", "ours", "joint")
FULL: Final = tuple(ARMS)


def changed(text: str, of: Arm = OURS) -> Arm:
    """Return an arm with some values changed, named by the change.

    Args:
        text: `name=value` pairs, separated by commas: settings by flat names, or `reptile`.
        of: The arm to change.

    Raises:
        ValueError: A pair has no `=`.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(equals and name for name, equals, _ in pairs):
        raise ValueError(f"--set takes name=value pairs, not {text}")
    values = {name.strip(): value.strip() for name, _, value in pairs}
    reptile = float(values.pop("reptile", of.reptile))
    changes = {**of.changes, **values}
    return replace(of, name=f"{of.name} {text}", changes=changes, reptile=reptile)


def tuned_rate(base: str, arm: str, path: Path = RATES_FILE) -> float:
    """Return the learning rate that was chosen for an arm on a base.

    Where none was, an arm `a+b` has the rate of `a`, and others have `DEFAULT_RATE`.
    """
    try:
        chosen = json.loads(path.read_text("utf-8"))["rates"].get(base, {})
    except FileNotFoundError:
        return DEFAULT_RATE
    return float(chosen.get(arm, chosen.get(arm.partition("+")[0], DEFAULT_RATE)))
