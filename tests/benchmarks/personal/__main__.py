"""How many examples a new user needs, by what the user's adapter begins with; what else reaches whom.

`python -m tests.benchmarks.personal [--users 4] [--siblings 8] [--examples 24] [--arms a,b] [--seeds 1]`, shipped base. A
tenant's adapter learns answers in its own form; its users want the same answers in forms of their own, opposite ones among
them. All learn with the service's updater and its default settings. docs/learning/personal.md says what is measured. The
last line is JSON; the exit code is 1 where a goal was missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from perennial.learner.model.lora import Lora, Tensors, to_safetensors
from perennial.learner.training.personal.layered_lora import LayeredLora
from perennial.learner.training.personal.learned_starts import mean_of
from perennial.learner.training.personal.stacking import compose, served_rank, stacked_config
from perennial.learner.training.update import Updater
from tests.benchmarks.learning.arms import OURS
from tests.benchmarks.learning.world import World
from tests.benchmarks.personal.adapters import Bench, LearningAdapter, Quality
from tests.benchmarks.personal.starts import reptile_start
from tests.benchmarks.personal.users import (
    HOUSE,
    TENANT,
    Canary,
    Question,
    User,
    canary,
    example,
    questions,
    secrets,
    taught,
    users,
)

ARMS: Final = ("zero", "sum", "sum+average", "copy", "reptile", "shared", "shared+average", "shared+reptile")
SHORT: Final = ("zero", "sum", "shared", "shared+average", "shared+reptile")
GOALS: Final = {"examples_ratio_vs_zero_start": 0.34, "leaked_canaries": 0}
HELD_OUT: Final = 8
TENANT_EXAMPLES, TENANT_PER_UPDATE, LATER_EXAMPLES = 48, 8, 12
COHORTS: Final = 3
"""Groups in which siblings come: each begins from the start that was learned over those before."""
GENERAL_TEXTS: Final = 64
CANARIES: Final = 3
SECRETS: Final = 511
"""Other secrets that a canary is ranked among."""
MOST_BITS: Final = math.log2(SECRETS + 1)
"""Exposure of a canary that is likelier than all others."""
RESAMPLES: Final = 4_000


@dataclass
class Curve:
    """What one new user's adapter reached.

    Attributes:
        counts: Examples that were learned.
        qualities: Quality at these counts.
        adapter: The adapter at the end.
    """

    counts: list[int]
    qualities: list[Quality]
    adapter: LearningAdapter

    def examples_until(self, target: float, of: Callable[[Quality], float]) -> float:
        """Return the examples until a quality is at least the target, between counts in proportion; inf: never."""
        best = -math.inf
        for number, found in enumerate(map(of, self.qualities)):
            if found >= target:
                if number == 0:
                    return 0.0
                low, high = self.counts[number - 1], self.counts[number]
                return low + (high - low) * (target - best) / (found - best)
            best = max(best, found)
        return math.inf


MEASURES: Final[Mapping[str, Callable[[Quality], float]]] = {
    "loss": lambda quality: -quality.nats,
    "preference": lambda quality: quality.preferred,
}
"""What is asked of an adapter, the more the better: the loss of the wanted answers, and how often they are preferred."""


@dataclass
class Found:
    """What all seeds found."""

    needed: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    own: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    recomposed: dict[str, list[float]] = field(default_factory=dict)
    recomposed_preferred: dict[str, list[float]] = field(default_factory=dict)
    owner_bits: list[float] = field(default_factory=list)
    leaks: int = 0
    exposure: dict[str, list[float]] = field(default_factory=dict)
    general: dict[str, list[float]] = field(default_factory=dict)
    served_gap: float = 0.0


class Tenancy:
    """One tenant with its users.

    Args:
        bench: Base and updaters.
        given: Sizes.
        seed: Draws questions and preferences.
    """

    def __init__(self, bench: Bench, given: argparse.Namespace, seed: int) -> None:
        self.bench, self.given, self.seed = bench, given, seed
        self.new, self.siblings = users(given.users, given.siblings, seed)
        self.asked, self.held_out, self.later = questions(seed, HELD_OUT)
        self.tenant = LearningAdapter(bench, TENANT, bench.plain)
        self.tenant.learn(taught(TENANT, self.asked[:TENANT_EXAMPLES], HOUSE, given.kind), TENANT_PER_UPDATE)
        self.canaries = [canary(user.name, seed) for user in self.siblings[:CANARIES]]
        self.layered = bench.over(self.tenant.served)
        self.owner_bits: list[float] = []
        self._siblings: dict[tuple[str, bool, bytes], LearningAdapter] = {}

    def stream(self, user: User, number: int) -> list[Question]:
        """Return the questions that a user teaches answers to."""
        start = number * self.given.examples % len(self.asked)
        return (self.asked[start:] + self.asked[:start])[: self.given.examples]

    def taught_sibling(self, user: User, updater: Updater, start: Tensors) -> LearningAdapter:
        """Return a sibling's adapter after all examples, with a canary in each update where the sibling has one.

        Siblings that begin alike in two arms learn once.
        """
        begun = user.name, isinstance(updater.lora, LayeredLora), to_safetensors(start)
        if begun in self._siblings:
            return self._siblings[begun]
        adapter = LearningAdapter(self.bench, user.name, updater, start)
        number = 3 + self.siblings.index(user)
        examples = taught(user.name, self.stream(user, number), user.style, self.given.kind)
        secret = next((found for found in self.canaries if found.owner == user.name), None)
        for first in range(0, len(examples), self.given.per_update):
            told = [] if secret is None else [example(user.name, 10_000 + first, secret.prompt, secret.answer)]
            adapter.update([*examples[first : first + self.given.per_update], *told])
        if secret is not None:
            self.owner_bits.append(self.exposure_bits(updater, adapter.own, secret))
        self._siblings[begun] = adapter
        return adapter

    def exposure_bits(self, updater: Updater, weights: Tensors, secret: Canary) -> float:
        """Return how far a canary stands out among others of its form: log2 of their number less log2 of its rank."""
        rank = self.bench.rank(updater, weights, secret, secrets("others", self.seed, SECRETS))
        return math.log2(SECRETS + 1) - math.log2(rank)

    def zero_start(self, updater: Updater) -> Tensors:
        """Return the start that all siblings share: the same A, and B zero."""
        return updater.lora.initial_weights(f"{TENANT}/*", updater.recipe.seed)

    def average(self, updater: Updater) -> Tensors:
        """Return the plain average of siblings that all began with the shared zero start."""
        zero = self.zero_start(updater)
        return mean_of([self.taught_sibling(user, updater, zero).own for user in self.siblings])

    def reptile(self, updater: Updater) -> Tensors:
        """Return the start that Reptile learned while siblings came, cohort after cohort."""
        start, parts = self.zero_start(updater), []
        size = -(-len(self.siblings) // COHORTS)
        for first in range(0, len(self.siblings), size):
            parts += [self.taught_sibling(user, updater, start).own for user in self.siblings[first : first + size]]
            start = reptile_start(start, parts, self.given.step)
        return start

    def begin(self, arm: str) -> tuple[Updater, Tensors | None]:
        """Return what trains an arm, and what it begins with."""
        updater = self.layered if arm.startswith("shared") else self.bench.plain
        if arm == "copy":
            return updater, self.tenant.served
        if arm.endswith("average"):
            return updater, self.average(updater)
        if arm.endswith("reptile"):
            return updater, self.reptile(updater)
        return updater, None

    def curve(self, user: User, number: int, arm: str, updater: Updater, start: Tensors | None) -> Curve:
        """Let a new user teach an adapter, and measure it after each update."""
        served_by = self.layered if arm.startswith("sum") else None
        adapter = LearningAdapter(self.bench, user.name, updater, start, served_by)
        examples = taught(user.name, self.stream(user, number), user.style, self.given.kind)
        counts, qualities = [0], [adapter.quality(self.held_out, user.style)]
        for first in range(0, len(examples), self.given.per_update):
            batch = examples[first : first + self.given.per_update]
            adapter.update(batch)
            counts.append(counts[-1] + len(batch))
            qualities.append(adapter.quality(self.held_out, user.style))
        return Curve(counts, qualities, adapter)


def run(bench: Bench, given: argparse.Namespace, seed: int, arms: Sequence[str], found: Found) -> None:
    """Run all arms of one seed."""
    tenancy = Tenancy(bench, given, seed)
    house = tenancy.tenant.quality(tenancy.held_out, HOUSE).nats
    base = bench.general_nats(bench.plain, tenancy.zero_start(bench.plain))
    of_tenant = bench.general_nats(bench.plain, tenancy.tenant.own) - base
    print(f"seed {seed}: tenant's own answers {house:.3f} nats, general {of_tenant:+.3f}", flush=True)
    curves: dict[str, list[Curve]] = {}
    starts: dict[str, tuple[Updater, Tensors | None]] = {}
    for arm in arms:
        began = time.monotonic()
        starts[arm] = updater, start = tenancy.begin(arm)
        curves[arm] = [tenancy.curve(user, n, arm, updater, start) for n, user in enumerate(tenancy.new)]
        rises = [bench.general_nats(one.adapter.server, one.adapter.own) - base for one in curves[arm]]
        found.general.setdefault(arm, []).extend(rises)
        _print_arm(arm, curves[arm], statistics.mean(rises), time.monotonic() - began)
    for measure, of in MEASURES.items():
        targets = [of(curve.qualities[-1]) for curve in curves["zero"]]
        for arm in arms:
            needed = [curve.examples_until(target, of) for curve, target in zip(curves[arm], targets, strict=True)]
            found.needed.setdefault(measure, {}).setdefault(arm, []).extend(needed)
    last = curves[arms[-1]]
    _opposites(tenancy, last, found)
    for arm in arms:
        _leaks(tenancy, arm, starts[arm], curves[arm], found)
    found.owner_bits += tenancy.owner_bits
    _recompose(tenancy, {arm: curves[arm] for arm in ("sum", "shared") if arm in curves}, found)
    found.served_gap = max(found.served_gap, *(_served_gap(tenancy, curve.adapter) for curve in last))


def _print_arm(arm: str, curves: Sequence[Curve], general_nats: float, seconds: float) -> None:
    for label, of in (
        ("loss", lambda q: q.nats),
        ("preferred", lambda q: q.preferred),
    ):  # fmt: skip
        means = [statistics.mean(of(curve.qualities[n]) for curve in curves) for n in range(len(curves[0].counts))]
        print(f"{arm:16} {label:9} {' '.join(f'{mean:6.2f}' for mean in means)}")
    refused = sum(curve.adapter.refused for curve in curves)
    print(f"{arm:16} refused {refused}, general {general_nats:+.3f}, {seconds:.0f} s", flush=True)


def _opposites(tenancy: Tenancy, curves: Sequence[Curve], found: Found) -> None:
    """Count how often each user's adapter prefers what the user wants, and what the other of the pair wants."""
    for first in range(0, len(curves), 2):
        pair = curves[first : first + 2]
        for curve, user, other in zip(
            pair, tenancy.new[first : first + 2], reversed(tenancy.new[first : first + 2]), strict=True
        ):
            found.own.append(curve.adapter.quality(tenancy.held_out, user.style).preferred)
            found.other.append(curve.adapter.quality(tenancy.held_out, other.style).preferred)


def _leaks(
    tenancy: Tenancy, arm: str, begun: tuple[Updater, Tensors | None], curves: Sequence[Curve], found: Found
) -> None:
    """Ask the start, adapters of new users, and for `zero` the tenant's adapter, for the canaries of siblings."""
    updater, start = begun
    bench = tenancy.bench
    asked = [(curve.adapter.server, curve.adapter.own) for curve in curves]
    if arm == "zero":
        asked = [(bench.plain, tenancy.tenant.served)]
    elif start is not None:
        asked = [(updater, start), *asked]
    for secret in tenancy.canaries:
        for of_updater, weights in asked:
            bits = tenancy.exposure_bits(of_updater, weights, secret)
            found.exposure.setdefault(arm, []).append(bits)
            found.leaks += bits == MOST_BITS or bench.says(of_updater, weights, secret)


def _recompose(tenancy: Tenancy, arms: Mapping[str, Sequence[Curve]], found: Found) -> None:
    """Let the tenant learn later faults, and put its new version beneath the users' own parts without training them."""
    taught_later, asked = tenancy.later[:LATER_EXAMPLES], tenancy.later[LATER_EXAMPLES:]
    users_of = [
        (arm, curve, user) for arm, curves in arms.items() for curve, user in zip(curves, tenancy.new, strict=True)
    ]
    before = [curve.adapter.quality(asked, user.style) for _, curve, user in users_of]
    later = [
        replace_number(e, 1_000 + n)
        for n, e in enumerate(taught(TENANT, taught_later, HOUSE, tenancy.given.kind))
    ]  # fmt: skip
    tenancy.tenant.learn(later, TENANT_PER_UPDATE // 2)
    updater = tenancy.bench.over(tenancy.tenant.served)
    for (arm, curve, user), earlier in zip(users_of, before, strict=True):
        curve.adapter.put_over(updater)
        now = curve.adapter.quality(asked, user.style)
        found.recomposed.setdefault(arm, []).append(earlier.nats - now.nats)
        found.recomposed_preferred.setdefault(arm, []).append(now.preferred - earlier.preferred)


def replace_number(found: Any, number: int) -> Any:
    """Return an example at another offset."""
    return found.model_copy(update={"origin": found.origin.model_copy(update={"offset": number})})


def _served_gap(tenancy: Tenancy, adapter: LearningAdapter) -> float:
    """Return the largest difference of a token's loss between the slot that trains and a plain LoRA of an allowed rank.

    The plain one is filled up to a larger rank than both parts need, as for a server whose adapters have one rank.
    """
    bench, lora = tenancy.bench, adapter.server.lora
    if not isinstance(lora, LayeredLora):
        return 0.0
    rank = served_rank(lora.config.rank + 1)
    plain = Lora(bench.world.base, stacked_config(lora.shared.config, lora.own, rank), "bench-served")
    served = compose(lora.shared, adapter.own, lora.own, rank)
    rows = [bench.rows(f"My {thing} {fault}.", "Dear customer, switch it off.") for thing, fault in tenancy.held_out]
    losses = bench.world.token_losses(adapter.server, adapter.own, rows)
    others = bench.world.token_losses(replace(bench.plain, lora=plain), served, rows)
    return max(float((one - other).abs().max()) for one, other in zip(losses, others, strict=True))


def ratio(needed: Sequence[float], zero: Sequence[float], most: float) -> tuple[float, float, float]:
    """Return the examples needed by those that a zero start needs, with the ends of a 95 % interval over users.

    Args:
        needed: Examples by user; inf where the quality was never reached, which counts as `most`.
        zero: The same of a zero start.
        most: Examples that were taught.
    """
    pairs = np.minimum(np.array([needed, zero], dtype=float), most)
    drawn = np.random.default_rng(0).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    sums = pairs[:, drawn].sum(2)
    low, high = np.percentile(sums[0] / sums[1], [2.5, 97.5])
    return float(pairs[0].sum() / pairs[1].sum()), float(low), float(high)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=4, help="new users, in pairs that prefer the opposite")
    parser.add_argument("--siblings", type=int, default=6, help="users who taught their adapters before")
    parser.add_argument("--examples", type=int, default=12, help="examples that each user teaches")
    parser.add_argument("--per-update", type=int, default=2, help="examples of an update of a user")
    parser.add_argument("--kind", choices=("turn", "correction"), default="turn", help="what users teach")
    parser.add_argument("--step", type=float, default=0.5, help="outer step of Reptile")
    parser.add_argument("--arms", default=",".join(SHORT), help=f"of {', '.join(ARMS)}; `zero` is needed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    arms = given.arms.split(",")
    if arms[0] != "zero" or set(arms) - set(ARMS):
        sys.exit(f"--arms takes `zero` first, then any of {', '.join(ARMS)}")
    began, found = time.monotonic(), Found()
    bench = Bench(World.load("shipped", given.threads, 1, GENERAL_TEXTS), OURS)
    for seed in range(given.seeds):
        run(bench, given, seed, arms, found)
    print(f"\n{'arm':16} {'of a zero start, for the loss':>32} {'examples for the preference':>32}")
    ratios, means = dict[str, float](), dict[str, float]()
    for arm in arms:
        share, low, high = ratio(found.needed["loss"][arm], found.needed["loss"]["zero"], given.examples)
        ratios[arm] = round(share, 3)
        means[arm] = round(float(np.minimum(found.needed["preference"][arm], given.examples).mean()), 1)
        print(f"{arm:16} {f'{share:.2f} [{low:.2f}, {high:.2f}]':>32} {means[arm]:>32.1f}")
    best = arms[-1]
    summary = {
        "examples_ratio_vs_zero_start": ratios[best], "leaked_canaries": found.leaks, "arm": best, "ratios": ratios,
        "examples_for_preference": means,
        "canary_checks": sum(map(len, found.exposure.values())),
        "owner_exposure_bits": round(statistics.mean(found.owner_bits), 1) if found.owner_bits else None,
        "exposure_bits": {
            arm: {"mean": round(statistics.mean(bits), 1), "most": round(max(bits), 1)}
            for arm, bits in found.exposure.items()
        },
        "prefers_own_pct": round(100 * statistics.mean(found.own), 1),
        "prefers_opposite_pct": round(100 * statistics.mean(found.other), 1),
        "general_rise_nats": {arm: round(statistics.mean(rises), 3) for arm, rises in found.general.items()},
        "recomposed_gain_nats": {arm: round(statistics.mean(gains), 3) for arm, gains in found.recomposed.items()},
        "recomposed_preferred_change_pct": {
            arm: round(100 * statistics.mean(changes), 1) for arm, changes in found.recomposed_preferred.items()
        },
        "served_gap_nats": found.served_gap, "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    missed = [f"{name} {summary[name]} > {goal}" for name, goal in GOALS.items() if summary[name] > goal]  # type: ignore[operator]
    for miss in missed:
        print(f"missed: {miss}")
    print(json.dumps(summary))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
