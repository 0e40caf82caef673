"""The energy counter of a GPU, as the learner reads it."""

from __future__ import annotations

import time

import pytest
import torch

from perennial.learner.costs.energy_meter import NVML, meter_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]


def test_the_counter_grows_by_a_plausible_power_while_the_device_computes():
    meter = meter_of(torch.device("cuda", torch.cuda.current_device()))
    assert meter is not None
    assert meter.source == NVML
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    began, before = time.perf_counter(), meter.joules()
    while time.perf_counter() - began < 2:
        for _ in range(50):
            matrix = (matrix @ matrix).clamp(-1, 1)
        torch.cuda.synchronize()
    watts = (meter.joules() - before) / (time.perf_counter() - began)
    reads = [time.perf_counter() for _ in range(21) if meter.joules()]
    print(f"{watts:.0f} W while it computed; a reading takes {(reads[-1] - reads[0]) / 20 * 1e6:.0f} microseconds")
    assert 50 < watts < 1500
