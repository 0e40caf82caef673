"""Compute and print the costs of an adapter: each update, and what else the same knowledge would cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console

from perennial.extras import MissingExtraError, require_extra
from perennial.learner.costs.operations import WeightCounts
from perennial.storage.errors import NotFoundError, PerennialError
from perennial.storage.registry.manifest import Manifest
from perennial.streams.cli.adapters import open_registry, require_adapter
from perennial.streams.cli.base.base_rows import reporter
from perennial.streams.cli.economics.cost_formulas import (
    ASSUMED_USD_PER_HOUR,
    ASSUMED_WATTS,
    DERIVED,
    FORMULA,
    MEASURED,
    RECORDED,
    YARDSTICKS,
    Assumptions,
    Cost,
    RetrainPlan,
    Yardstick,
    break_even,
    context_flops,
    serving_flops,
    total_cost,
    training_flops_per_token,
)
from perennial.streams.cli.economics.recorded_updates import (
    TrainedUpdate,
    held_examples,
    trained_updates,
    weight_shapes,
)
from perennial.streams.cli.tables import Column, print_facts, print_table
from perennial.streams.devstack.discovery import connected_settings
from perennial.streams.settings import Settings

_MEASURE_S = 2.0
_UPDATE_COLUMNS = (
    Column("seq", right=True), Column("outcome"), Column("tokens", right=True), Column("GFLOP", right=True),
    Column("of them gate", 3, right=True), Column("device s", right=True), Column("J", 1, right=True),
    Column("rent USD", 1, right=True), Column("time from", 2), Column("energy from", 2),
)  # fmt: skip
_WAY_COLUMNS = (
    Column("the same knowledge by"), Column("tokens", right=True), Column("GFLOP", right=True),
    Column("device s", right=True), Column("J", 1, right=True), Column("rent USD", right=True),
    Column("electricity USD", 1, right=True), Column("time from", 2),
)  # fmt: skip


@dataclass(frozen=True)
class EconomicsOptions:
    """What the command was asked for.

    Attributes:
        usd_per_hour: Rent of the device; None for the default of its kind.
        usd_per_kwh: Price of electricity.
        watts: Power of the device where its energy is not measured; None for the default of its kind.
        request_tokens: Tokens of a request and its answer.
        context_tokens: Tokens of documents in a request; None for all.
        retrain_passes: Times that a retraining trains each token; None for what the recipe does.
        on: Name of a yardstick to compute for instead; None for the adapter's own base and device.
        measure: Load the base and time it.
        limit: Most updates to print.
    """

    usd_per_hour: float | None = None
    usd_per_kwh: float = 0.15
    watts: float | None = None
    request_tokens: int = 256
    context_tokens: int | None = None
    retrain_passes: float | None = None
    on: str | None = None
    measure: bool = True
    limit: int = 12

    def assumptions(self, device: str) -> Assumptions:
        """Return prices and power for a kind of device."""
        hour = ASSUMED_USD_PER_HOUR[device] if self.usd_per_hour is None else self.usd_per_hour
        watts = ASSUMED_WATTS[device] if self.watts is None else self.watts
        return Assumptions(hour, self.usd_per_kwh, watts, self.request_tokens)


@dataclass(frozen=True)
class _Machine:
    """What computes, and how fast it is.

    Attributes:
        title: For people.
        device: `cpu` or `cuda`.
        counts: Weights of base and LoRA; the head is 0 where it is not known.
        positions: Longest context; None where it is not known.
        prefill_s: Measured time that a request of `prefill_tokens` more takes; None where it is not measured.
        prefill_tokens: Tokens of that measurement.
        flops_per_s: Rate for what is not measured; None where it is not known.
        rate_from: Where that rate is from.
    """

    title: str
    device: str
    counts: WeightCounts
    positions: int | None = None
    prefill_s: float | None = None
    prefill_tokens: int = 0
    flops_per_s: float | None = None
    rate_from: str = DERIVED

    def at_rate(self, tokens: int, flops: float) -> Cost:
        """Return what operations cost at the known rate."""
        return Cost(tokens, flops, flops / self.flops_per_s if self.flops_per_s else None, self.rate_from)


def show_economics(adapter: str, options: EconomicsOptions, *, as_json: bool) -> int:
    """Print what an adapter's updates cost and return the exit code.

    Raises:
        NotFoundError: The adapter has no version, or the newest version's weights were collected.
    """
    settings = connected_settings()
    registry = open_registry(settings)
    require_adapter(registry, adapter)
    head = registry.head(adapter)
    assert head is not None
    updates = trained_updates(registry, adapter)
    groups = [[example.tokens for example in group] for group in held_examples(registry, head)]
    shapes = weight_shapes(registry, head.manifest)
    if options.on is not None:
        machine = _of_yardstick(YARDSTICKS[options.on])
    else:
        kept = _carried(sum(map(sum, groups)), options)
        machine = _of_adapter(settings, head.manifest, WeightCounts.of_shapes(shapes, 0), updates, kept, options)
    facts = economics_facts(adapter, head.manifest, updates, groups, machine, options)
    if as_json:
        print(json.dumps(facts))
    else:
        _print(facts, options)
    return 0


def _of_yardstick(yardstick: Yardstick) -> _Machine:
    return _Machine(
        yardstick.title, yardstick.device, yardstick.counts, yardstick.positions,
        flops_per_s=yardstick.flops_per_s, rate_from=FORMULA,
    )  # fmt: skip


def _of_adapter(
    settings: Settings,
    manifest: Manifest,
    counts: WeightCounts,
    updates: Sequence[TrainedUpdate],
    kept_tokens: int,
    options: EconomicsOptions,
) -> _Machine:
    """Return the adapter's own base and device: measured here where the base is at hand, else by the recorded rate."""
    costs = [update.cost for update in updates if update.cost is not None and update.cost.seconds > 0]
    device = costs[-1].device if costs else "cpu"
    machine = _Machine(manifest.base_model, device if device in ASSUMED_WATTS else "cpu", counts)
    if costs:
        rate = sum(c.training_flops + c.measuring_flops for c in costs) / sum(c.seconds for c in costs)
        machine = replace(machine, flops_per_s=rate or None)
    if options.measure and kept_tokens:
        try:
            machine = _measured(settings, manifest, machine, kept_tokens, options.request_tokens)
        except MissingExtraError as error:
            _say(f"the base is not measured: {error}")
        except PerennialError as error:
            _say(f"the base is not measured: {error}; `--no-measure` does not try")
    return machine


def _measured(
    settings: Settings, manifest: Manifest, machine: _Machine, kept_tokens: int, request_tokens: int
) -> _Machine:
    """Return the machine with what the base says of itself, and how long it reads the documents here."""
    require_extra("worker", "timing the base")
    from perennial.learner.costs.prefill import prefill_seconds
    from perennial.learner.model.base import load_base

    report = reporter()
    report(f"loading {settings.model.base}")
    base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    if base.digest != manifest.base_sha256:
        raise NotFoundError(
            "the base that is set is not the adapter's", got=base.name, allowed=manifest.base_model,
            remedy="set PERENNIAL_BASE",
        )  # fmt: skip
    question = min(request_tokens, max(1, base.max_positions // 2))
    carried = min(kept_tokens, max(1, base.max_positions - question))
    report(f"timing requests with and without {carried} tokens of documents")
    time_of = partial(prefill_seconds, base, seconds=_MEASURE_S)
    seconds = max(0.0, time_of(question + carried) - time_of(question))
    head = base.model.get_output_embeddings()
    counts = replace(machine.counts, head=0 if head is None else head.weight.numel())
    rate = machine.flops_per_s or (context_flops(counts, carried) / seconds if seconds else None)
    return replace(
        machine,
        counts=counts,
        positions=base.max_positions,
        prefill_s=seconds,
        prefill_tokens=carried,
        flops_per_s=rate,
    )


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def economics_facts(
    adapter: str,
    manifest: Manifest,
    updates: Sequence[TrainedUpdate],
    groups: Sequence[Sequence[int]],
    machine: _Machine,
    options: EconomicsOptions,
) -> dict[str, Any]:
    """Return everything that the command prints.

    Args:
        adapter: Name of the adapter.
        manifest: Its newest version.
        updates: Its updates, oldest first.
        groups: Tokens of each example that it holds, by the update that learned them, oldest first.
        machine: What computes.
        options: What the command was asked for.
    """
    assumed = options.assumptions(machine.device)
    elsewhere = options.on is not None
    costs = [_cost_of(update, machine, elsewhere=elsewhere).with_energy(assumed.watts) for update in updates]
    total = total_cost(costs)
    held = [tokens for group in groups for tokens in group]
    carried = _carried(sum(held), options)
    context = _context_cost(carried, machine).with_energy(assumed.watts)
    serving = machine.at_rate(assumed.request_tokens, serving_flops(machine.counts, assumed.request_tokens))
    plan = _plan(manifest, options.retrain_passes)
    retrain = _retrain(plan, [held], machine).with_energy(assumed.watts)
    always = _retrain(plan, [held[:end] for end in _ends(groups)], machine).with_energy(assumed.watts)
    saved_flops = context.flops - serving.flops
    known = context.seconds is not None and serving.seconds is not None
    saved_s = (context.seconds or 0.0) - (serving.seconds or 0.0) if known else None
    mean_flops = total.flops / len(costs) if costs else 0.0
    return {
        "adapter": adapter,
        "machine": {
            "title": machine.title, "device": machine.device, **asdict(machine.counts),
            "head_known": machine.counts.head > 0, "context_tokens": machine.positions,
        },
        "assumed": asdict(assumed),
        "updates": [
            {"seq": update.manifest.seq, "version": update.version, "outcome": update.manifest.outcome,
             "measuring_flops": update.cost.measuring_flops if update.cost and not elsewhere else None,
             **_facts(cost, assumed)}
            for update, cost in zip(updates, costs, strict=True)
        ],
        "total": _facts(total, assumed),
        "examples": {"held": len(held), "tokens": sum(held)},
        "context_per_request": {
            **_facts(context, assumed), "fits": None if machine.positions is None else carried + assumed.request_tokens <= machine.positions,
        },
        "adapter_per_request": _facts(serving.with_energy(assumed.watts), assumed),
        "retraining": _facts(retrain, assumed),
        "retraining_at_every_update": _facts(always, assumed),
        "break_even": {
            "updates_against_context_requests": {
                "by_flops": break_even(total.flops, saved_flops), "by_seconds": break_even(total.seconds, saved_s),
            },
            "retraining_against_context_requests": {
                "by_flops": break_even(retrain.flops, saved_flops), "by_seconds": break_even(retrain.seconds, saved_s),
            },
            "updates_that_cost_one_retraining": retrain.flops / mean_flops if mean_flops else None,
        },
    }  # fmt: skip


def _ends(groups: Sequence[Sequence[int]]) -> list[int]:
    ends, end = [], 0
    for group in groups:
        end += len(group)
        ends.append(end)
    return ends


def _cost_of(update: TrainedUpdate, machine: _Machine, *, elsewhere: bool) -> Cost:
    """Return what an update cost as recorded, or by the formula of its trained tokens alone."""
    tokens, cost = update.manifest.tokens, update.cost
    if cost is None or elsewhere:
        return machine.at_rate(tokens, float(tokens * training_flops_per_token(machine.counts)))
    flops = cost.training_flops + cost.measuring_flops
    return Cost(tokens, flops, cost.seconds, RECORDED, cost.joules, cost.energy_source or DERIVED)


def _context_cost(tokens: int, machine: _Machine) -> Cost:
    """Return what it costs to read tokens of documents in one request."""
    flops = context_flops(machine.counts, tokens)
    if machine.prefill_s is None or not machine.prefill_tokens:
        return machine.at_rate(tokens, flops)
    if tokens == machine.prefill_tokens:
        return Cost(tokens, flops, machine.prefill_s, MEASURED)
    longer = tokens / machine.prefill_tokens
    return Cost(
        tokens, flops, machine.prefill_s * longer, f"{MEASURED} on {machine.prefill_tokens} tokens, in proportion"
    )


def _carried(held_tokens: int, options: EconomicsOptions) -> int:
    return held_tokens if options.context_tokens is None else min(held_tokens, options.context_tokens)


def _plan(manifest: Manifest, passes: float | None) -> RetrainPlan:
    """Return how a retraining would train: each token so often, or as the version's recipe does."""
    config = manifest.config
    if passes is not None:
        return RetrainPlan(epochs=passes)
    least = int(config.get("steps") or 0) * int(config.get("rows") or 0)
    return RetrainPlan(float(config.get("epochs") or 1), least, float(config.get("general_share") or 0.0))


def _retrain(plan: RetrainPlan, sets: Sequence[Sequence[int]], machine: _Machine) -> Cost:
    """Return what it costs to train each of these sets of examples from nothing."""
    tokens = sum(plan.tokens(examples) for examples in sets)
    return machine.at_rate(tokens, float(tokens * training_flops_per_token(machine.counts)))


def _facts(cost: Cost, assumed: Assumptions) -> dict[str, Any]:
    return {**asdict(cost), "rent_usd": cost.rent_usd(assumed), "electricity_usd": cost.electricity_usd(assumed)}


# ---- printing


def _print(facts: dict[str, Any], options: EconomicsOptions) -> None:
    machine, assumed = facts["machine"], facts["assumed"]
    head = f"{_count(machine['head'])} in the output layer" if machine["head_known"] else "output layer not counted"
    print_facts({
        "adapter": facts["adapter"],
        "on": f"{machine['title']}, {machine['device']}",
        "weights": f"{_count(machine['frozen'])} frozen, {_count(machine['lora'])} of the LoRA, {head}",
        "prices": f"{assumed['usd_per_hour']:.2f} USD an hour (--usd-per-hour), {assumed['usd_per_kwh']:.2f} USD a kWh "
        "(--usd-per-kwh), which a rent includes",
        "assumed": f"{assumed['watts']:g} W where energy is not measured (--watts), {assumed['request_tokens']} tokens a "
        "request (--request-tokens)",
        "holds": f"{facts['examples']['held']} examples, {facts['examples']['tokens']} tokens",
    })  # fmt: skip
    shown = facts["updates"][-options.limit :] if options.limit else []
    rows = [[str(row["seq"]), row["outcome"], *_update_cells(row)] for row in shown]
    rows.append([f"all {len(facts['updates'])}", "", *_update_cells({**facts["total"], "measuring_flops": None})])
    print()
    print_table(_UPDATE_COLUMNS, rows)
    ways = [
        ("the updates, all together", facts["total"]),
        ("documents in a request, each time", facts["context_per_request"]),
        ("(the adapter in a request, each time)", facts["adapter_per_request"]),
        ("one retraining with all examples", facts["retraining"]),
        ("a retraining instead of each update", facts["retraining_at_every_update"]),
    ]
    print()
    print_table(_WAY_COLUMNS, [_way_cells(name, cost) for name, cost in ways])
    print()
    for line in _conclusions(facts):
        print(line)


def _update_cells(row: dict[str, Any]) -> list[str]:
    gate = row["measuring_flops"]
    return [
        str(row["tokens"]), _giga(row["flops"]), "-" if gate is None else _giga(gate), _number(row["seconds"]),
        _number(row["joules"]), _money(row["rent_usd"]), row["seconds_from"] or "-", row["joules_from"] or "-",
    ]  # fmt: skip


def _way_cells(name: str, cost: dict[str, Any]) -> list[str]:
    return [
        name, str(cost["tokens"]), _giga(cost["flops"]), _number(cost["seconds"]), _number(cost["joules"]),
        _money(cost["rent_usd"]), _money(cost["electricity_usd"]), cost["seconds_from"] or "-",
    ]  # fmt: skip


def _conclusions(facts: dict[str, Any]) -> list[str]:
    found = facts["break_even"]
    context = facts["context_per_request"]
    lines = [
        f"break-even: {what} as much as documents in the context of {_requests(found[key])}"
        for what, key in (
            ("the updates cost", "updates_against_context_requests"),
            ("one retraining costs", "retraining_against_context_requests"),
        )
    ]
    updates = found["updates_that_cost_one_retraining"]
    if updates is not None:
        lines.append(
            f"one retraining costs as much as {updates:.1f} mean updates; further passes over corrections are not in it "
            "(--retrain-passes)"
        )
    if context["fits"] is False:
        limit = facts["machine"]["context_tokens"]
        lines.append(
            f"the documents do not fit into a request: {context['tokens']} tokens, and the base takes {limit}; retrieval "
            "would choose some (--context-tokens)"
        )
    lines.append("a prefix cache that holds the documents saves reading them; docs/economics.md says what then remains")
    return lines


def _requests(found: dict[str, int | None]) -> str:
    shown = [
        f"{count:,} requests by {what}" if count is not None else f"no number of requests by {what}"
        for what, count in (("operations", found["by_flops"]), ("time", found["by_seconds"]))
    ]
    return ", ".join(shown)


def _count(value: float) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.2f} {name}"
    return f"{value:,.0f}"


def _giga(flops: float) -> str:
    return _number(flops / 1e9)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 9)}f}"


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 1 else f"{value:,.2f}"
