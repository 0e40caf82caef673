"""The benchmark of scale, in its short form: what it claims holds at small sizes too."""

from __future__ import annotations

from tests.benchmarks.bench_scale import run


def test_case_scale_operations_about_few_examples_do_not_grow_with_the_versions() -> None:
    """faults.md, "Scale: growth without bound": forget, sweep and explain read every version, the calendar every body."""
    summary = run((32, 320), (20,), 5)
    growth = [
        summary[f"{name}_calls_growth"] for name in ("forget", "sweep", "update", "explain", "calendar")
    ]  # fmt: skip
    assert max(growth) <= 2, summary
    assert summary["resident_bytes_per_adapter"] > 0
