"""Load a base, name what matters about it, measure it on this machine, and show the settings that suit it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from perennial.extras import require_extra
from perennial.streams.cli.base.base_rows import reporter
from perennial.streams.settings import Settings, load_settings
from perennial.streams.settings.presets import preset_of, preset_settings

if TYPE_CHECKING:
    from perennial.learner.model.base import Base

_ROWS = 12
_MAX_TOKENS_SHOWN = 12


def check_base(name: str | None, *, seconds: float, as_json: bool) -> int:
    """Print what a base is, how fast it is here, and which settings suit it.

    Args:
        name: name of the base; None: the one that is set.
        seconds: how long to measure scoring, and how long training.
        as_json: print JSON instead of text.

    Returns:
        The exit code: 0.

    Raises:
        BaseModelError: the base cannot be used.
        MissingExtraError: the extra `worker` is not installed.
    """
    require_extra("worker", "`perennial base check`")
    settings = load_settings()
    if name is not None:
        settings = settings.replace(base=name)
    report = reporter()
    report(f"loading {settings.model.base}")
    from perennial.learner.model.base import load_base

    base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    facts = describe(base, settings)
    for what, measure in (("scoring", measure_scoring), ("training", measure_training)):
        report(f"measuring {what} for {seconds:g} s")
        facts[f"{what}_tokens_per_s"] = round(measure(base, settings, seconds), 1)
    facts["settings"] = recommended(settings)
    if as_json:
        print(json.dumps(facts))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for key, value in facts.items():
        if key != "settings":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            console.print(f"{key.replace('_', ' '):<24} {shown}", markup=False)
    source = facts["settings"]["source"]
    console.print(f"\nsettings for a base of this size, where nothing else is set ({source}):", markup=False)
    for variable, value in facts["settings"]["values"].items():
        console.print(f"  {variable}={value}", markup=False)
    return 0


def describe(base: Base, settings: Settings) -> dict[str, Any]:
    """Return what a base is, by name: architecture, parameters, context, chat template, control tokens, speed of loading."""
    from perennial.learner.bases.compute_dtype import dtype_name

    tokenizer = base.tokenizer
    control = sorted({str(token) for token in tokenizer.all_special_tokens})
    more = len(control) - _MAX_TOKENS_SHOWN
    return {
        "base": base.name,
        "digest": base.digest,
        "architecture": type(base.model).__name__,
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "context_tokens": base.max_positions,
        "vocabulary": len(tokenizer),
        "chat_template": "yes" if getattr(tokenizer, "chat_template", None) else "no: turns are plain text",
        "end_token": str(tokenizer.eos_token),
        "control_tokens": [*control[:_MAX_TOKENS_SHOWN], *([f"and {more} more"] if more > 0 else [])],
        "device": str(base.device),
        "dtype": dtype_name(base.compute_dtype or base.dtype),
        "threads": settings.model.threads,
    }


def recommended(settings: Settings) -> dict[str, Any]:
    """Return the settings by the size of the base as they are in force, and where their preset comes from."""
    preset = preset_of(settings.model.base)
    environment = settings.environment()
    variables = sorted(f"PERENNIAL_{name.upper()}" for name in preset_settings())
    return {
        "preset": preset.name if preset else None,
        "source": preset.source if preset else "the size of the base cannot be told from its name: general defaults",
        "values": {variable: environment[variable] for variable in variables},
    }


def measure_scoring(base: Base, settings: Settings, seconds: float) -> float:
    """Return how many tokens per second the scorer's forward pass takes: rows of the length that is set."""
    import torch

    from perennial.learner.model.loss import autocast, token_losses

    rows = _rows(base, settings)

    def once() -> None:
        with torch.no_grad(), autocast(base.device, base.compute_dtype):
            token_losses(base.model, rows, base.device, 0).sum().item()

    return _rate(once, sum(len(row.ids) for row in rows), seconds)


def measure_training(base: Base, settings: Settings, seconds: float) -> float:
    """Return how many tokens per second an update trains: with rows, rank and general text as they are set."""
    from dataclasses import replace

    from perennial.learner.model.lora import Lora, LoraConfig
    from perennial.learner.together.train_together import AdapterJob, train_together
    from perennial.learner.training.trainer import TrainConfig, train

    training = settings.training
    rows = _rows(base, settings)
    if training.general_kl_weight > 0:
        general = round(len(rows) * training.general_share)
        rows = [replace(row, like_base=number < general) for number, row in enumerate(rows)]
    lora = Lora(base, LoraConfig(training.rank, training.alpha), slot="check")
    weights = lora.initial_weights("check", 0)
    config = TrainConfig(
        training.learning_rate, training.clip_norm, pad=0, packed_tokens=training.packed_tokens,
        like_base_weight=training.general_kl_weight,
    )  # fmt: skip

    def once() -> None:
        if training.shared_passes:
            train_together(lora, [AdapterJob(weights, None, [rows], config)])
        else:
            train(lora, weights, None, [rows], config)

    return _rate(once, sum(len(row.ids) for row in rows), seconds)


def _rows(base: Base, settings: Settings) -> list[Any]:
    """Return rows of token ids, each another cut out of the vocabulary; what they say does not change the speed."""
    from perennial.learner.model.tokenization import TokenRow

    width = min(settings.training.row_tokens, base.max_positions)
    size = len(base.tokenizer)
    return [TokenRow(tuple((7 * row + 13 * column) % size for column in range(width))) for row in range(_ROWS)]


def _rate(
    once: Callable[[], None], tokens: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median rate of calls within a time, in tokens per second; the first call warms up."""
    once()
    rates: list[float] = []
    end = clock() + seconds
    while not rates or clock() < end:
        began = clock()
        once()
        rates.append(tokens / (clock() - began))
    return statistics.median(rates)
