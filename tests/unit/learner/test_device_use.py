"""What updates use of the device: operations by formula, energy where a counter can be read, each thread's share."""

from __future__ import annotations

import ctypes
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perennial.learner.costs import energy_meter
from perennial.learner.costs.device_use import DeviceUse, Reading, add_use, take_use
from perennial.learner.costs.energy_meter import NvmlMeter, RaplMeter, joules_of, meter_of
from perennial.learner.costs.operations import WeightCounts, measuring_flops, training_flops
from perennial.learner.costs.prefill import prefill_seconds
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import row_token_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training.compute import Compute, ComputeAlone
from perennial.learner.training.trainer import TrainConfig, train
from tests import tiny

ROWS = [TokenRow(tuple(range(3, 27)), 1), TokenRow(tuple(range(5, 21)), 6)]
PLAN = TrainConfig(learning_rate=1e-3, clip_norm=1.0, pad=2)
CPU = torch.device("cpu")


def lora() -> Lora:
    return Lora(tiny.base(), LoraConfig(4, 8))


# ---- operations


def test_weights_are_counted_from_the_shapes_of_the_adapter():
    shapes = {
        "a.lora_A.weight": (2, 10),
        "a.lora_B.weight": (7, 2),
        "b.lora_A.weight": (2, 3),
        "b.lora_B.weight": (5, 2),
    }
    assert WeightCounts.of_shapes(shapes, 40) == WeightCounts(frozen=70 + 15, lora=2 * 17 + 2 * 8, head=40)


def test_weights_are_those_of_the_model():
    slot = lora()
    counts = WeightCounts.of(slot)
    assert counts.lora == sum(parameter.numel() for parameter in slot.parameters.values())
    assert counts.frozen == sum(layer.base_layer.weight.numel() for layer in slot.layers().values())
    assert counts.head == slot.model.get_output_embeddings().weight.numel()


def counted(call) -> int:
    """Return the operations of matrix products with weights that PyTorch counts; attention's are left out."""
    call()  # the first call tries out what the model can do
    with FlopCounterMode(display=False) as counter:
        call()
    by_name = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in by_name.items() if str(op) in {"aten.mm", "aten.addmm"})


def test_the_formula_of_a_measurement_is_what_pytorch_counts():
    slot = lora()
    row = ROWS[:1]  # a single row, so that nothing is padded
    found = counted(lambda: row_token_losses(slot, row, pad=2, adapted=True))
    assert measuring_flops(WeightCounts.of(slot), row) == pytest.approx(found, rel=0.05)


def test_the_formula_of_a_step_is_what_pytorch_counts():
    slot = lora()
    row = ROWS[:1]
    found = counted(lambda: train(slot, slot.initial_weights("a", 0), None, [row], PLAN))
    ours = training_flops(WeightCounts.of(slot), row)
    # The first layer's products need no gradient of their input, of which the formula knows nothing.
    assert 0.8 * ours < found <= 1.05 * ours


def test_a_row_that_is_compared_with_the_base_takes_a_forward_pass_more():
    counts = WeightCounts(frozen=100, lora=10, head=50)
    row = TokenRow((1, 2, 3, 4), 1)
    assert row.tokens == 3
    plain = 4 * (400 + 60) + 3 * 200
    assert training_flops(counts, [row]) == plain
    compared = TokenRow(row.ids, 1, like_base=True)
    assert training_flops(counts, [compared]) == plain + 2 * (4 * 100 + 3 * 50)


# ---- energy


def zone(folder: Path, name: str, kind: str, microjoules: int, size: int = 1_000_000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{kind}\n")
    (path / "max_energy_range_uj").write_text(f"{size}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_rapl_adds_the_packages_and_goes_on_over_a_wrap(tmp_path):
    one = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    two = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 5)
    meter = RaplMeter(tmp_path)
    assert meter.joules() == 0
    (one / "energy_uj").write_text("950000")
    (two / "energy_uj").write_text("50100")
    assert meter.joules() == pytest.approx(0.1)
    (one / "energy_uj").write_text("50000")  # 100,000 µJ later, over the end of its range
    assert meter.joules() == pytest.approx(0.2)


def test_without_a_counter_the_energy_is_not_known(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        RaplMeter(tmp_path)
    if os.geteuid() != 0:
        closed = zone(tmp_path, "intel-rapl:0", "package-0", 1)
        (closed / "energy_uj").chmod(0)
        with pytest.raises(PermissionError):
            RaplMeter(tmp_path)
    monkeypatch.setattr(energy_meter, "RaplMeter", lambda: RaplMeter(tmp_path / "none"))
    meter_of.cache_clear()
    assert (meter_of(CPU), joules_of(CPU)) == (None, None)
    meter_of.cache_clear()


def test_a_counter_that_fails_later_does_not_end_an_update(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = RaplMeter(tmp_path)
    monkeypatch.setattr(energy_meter, "RaplMeter", lambda: meter)
    meter_of.cache_clear()
    assert joules_of(CPU) == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert joules_of(CPU) is None
    meter_of.cache_clear()


class NvmlStandIn:
    """The three functions of NVIDIA's library that are called, with the signatures of its header file."""

    def __init__(self, uuid: bytes, code: int = 0) -> None:
        self.millijoules = 5_000

        def handle(asked: bytes, device: Any) -> int:
            device[0] = 77
            return 0 if asked == uuid else 6  # NVML_ERROR_NOT_FOUND

        def energy(device: int, found: Any) -> int:
            assert device == 77
            found[0] = self.millijoules
            return code

        counter = ctypes.POINTER(ctypes.c_ulonglong)
        self.nvmlInit_v2 = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
        self.nvmlDeviceGetHandleByUUID = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)
        )(handle)
        self.nvmlDeviceGetTotalEnergyConsumption = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, counter)(energy)


def test_nvml_is_asked_for_the_gpu_by_its_identity(monkeypatch):
    library = NvmlStandIn(b"GPU-1234")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libnvidia-ml.so.1": library}[name])
    meter = NvmlMeter("GPU-1234")
    library.millijoules = 7_500
    assert meter.joules() == 7.5
    with pytest.raises(OSError, match="nvmlDeviceGetHandleByUUID returned 6"):
        NvmlMeter("GPU-other")


def test_a_gpu_without_a_counter_has_no_meter(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: NvmlStandIn(b"GPU-1", code=3))  # NVML_ERROR_NOT_SUPPORTED
    with pytest.raises(OSError, match="nvmlDeviceGetTotalEnergyConsumption returned 3"):
        NvmlMeter("GPU-1")


# ---- shares


def test_energy_that_one_part_lacks_is_not_known_of_the_sum():
    assert DeviceUse(1, 2, 3, 4) + DeviceUse(1, 1, 1, 1) == DeviceUse(2, 3, 4, 5)
    assert (DeviceUse(1, 2) + DeviceUse(1, None)).joules is None
    assert DeviceUse(4, 8).share(0.25, training_flops=7) == DeviceUse(1, 2, 7, 0)


def test_each_thread_counts_for_itself():
    take_use()
    add_use(DeviceUse(1))
    with ThreadPoolExecutor(1) as other:
        assert other.submit(take_use).result() == DeviceUse()
    assert take_use().seconds == 1
    assert take_use() == DeviceUse()


@pytest.mark.parametrize("compute", [ComputeAlone(), GatheredPasses()])
def test_training_and_measuring_are_counted(compute: Compute):
    slot, counts = lora(), WeightCounts.of(lora())
    weights = slot.initial_weights("a", 0)
    take_use()
    compute.train(slot, weights, None, [ROWS, ROWS[:1]], PLAN, None, lambda: None)
    trained = take_use()
    assert trained.training_flops == training_flops(counts, [*ROWS, ROWS[0]])
    assert trained.measuring_flops == 0
    assert trained.seconds > 0
    compute.token_losses(slot, weights, ROWS, 2, None, lambda: None)
    measured = take_use()
    assert (measured.training_flops, measured.measuring_flops) == (0, measuring_flops(counts, ROWS))


def test_adapters_that_share_a_pass_share_its_time_by_their_operations(monkeypatch):
    readings = itertools.count()
    monkeypatch.setattr("perennial.learner.costs.device_use.time.perf_counter", lambda: float(next(readings)))
    passes = GatheredPasses(2, wait_s=20)
    base = tiny.base()
    slots = [Lora(base, LoraConfig(4, 8), f"slot{number}") for number in range(2)]
    steps = [[ROWS[:1]], [[*ROWS[:1], *ROWS[:1], *ROWS[:1]]]]

    def of_thread(number: int) -> DeviceUse:
        take_use()
        with passes.joining():
            weights = slots[number].initial_weights("a", 0)
            passes.train(slots[number], weights, None, steps[number], PLAN, None, lambda: None)
        return take_use()

    with passes.joining(), ThreadPoolExecutor(2) as pool:  # the round waits for both
        futures = [pool.submit(of_thread, number) for number in range(2)]
        small, large = (future.result() for future in futures)
    assert large.training_flops == 3 * small.training_flops
    if small.seconds + large.seconds == pytest.approx(1.0):  # they met in one round
        assert large.seconds == pytest.approx(0.75)


def test_the_time_of_a_prefill_is_the_median_without_the_first_pass():
    times = iter([0.0, 1.0, 1.5, 1.6, 2.0, 4.0, 12.0])
    assert prefill_seconds(tiny.base(), 8, 10.0, clock=lambda: next(times)) == pytest.approx(1.25)


def test_an_energy_counter_that_was_set_back_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100.0, 3.0])
    monkeypatch.setattr("perennial.learner.costs.device_use.joules_of", lambda _: next(readings))
    assert Reading.now(torch.device("cpu")).until_now(torch.device("cpu")).joules is None
