"""Many adapters in one pass on a CUDA device: as `train` trains each alone, and nothing spreads from one to another."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.together.kernels import fused_layers
from perennial.learner.together.shared_pass import SharedPass, packs_together
from perennial.learner.together.train_together import AdapterJob, train_together
from perennial.learner.training.trainer import TrainConfig, TrainResult, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]
PLAN = TrainConfig(learning_rate=1e-3, clip_norm=1.0, pad=2, warmup_steps=2)


@pytest.fixture(scope="module")
def lora() -> Lora:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make_deterministic(2)
    return Lora(load_base("shipped", "cuda", 2), LoraConfig(rank=8, alpha=16))


def jobs_over(lora: Lora, count: int, like_base: int = 0) -> list[AdapterJob]:
    rng = random.Random(5)

    def rows(number: int) -> list[TokenRow]:
        return [
            TokenRow(
                tuple(rng.randrange(8, 4000) for _ in range(rng.randrange(9, 60))), rng.randrange(1, 4),
                like_base=index >= number - like_base,
            )
            for index in range(number)
        ]  # fmt: skip

    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        weights = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in lora.initial_weights(f"a{index}", 0).items()
        }
        made.append(AdapterJob(weights, None, [rows(4) for _ in range(3 - index % 2)], PLAN))
    return made


def assert_like(one: TrainResult, other: TrainResult, job: AdapterJob) -> None:
    """Assert that two runs in bf16 went the same way."""
    assert one.losses == pytest.approx(other.losses, rel=5e-3)
    assert one.norms == pytest.approx(other.norms, rel=5e-2)
    for name, moment in one.optimizer.items():
        if name.startswith("exp_avg."):
            assert float((moment - other.optimizer[name]).norm()) <= 0.1 * float(other.optimizer[name].norm()), name
    for name, start in job.weights.items():
        assert not torch.equal(one.weights[name], start), f"{name} was not trained"


def equal(one: TrainResult, other: TrainResult) -> bool:
    return one.losses == other.losses and all(
        torch.equal(tensor, (other.weights | other.optimizer)[name])
        for name, tensor in (one.weights | one.optimizer).items()
    )


@pytest.mark.parametrize("like_base", [0, 1])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_adapters_in_one_pass_are_each_trained_as_alone(lora: Lora, count: int, graphs: bool, like_base: int) -> None:
    assert packs_together(lora)
    jobs = jobs_over(lora, count, like_base)
    for _ in range(3):  # computed, captured, replayed
        results = train_together(lora, jobs, graphs=graphs)
    for job, result in zip(jobs, results, strict=True):
        assert_like(result, train(lora, job.weights, None, job.schedule, job.config), job)
    again = train_together(lora, jobs, graphs=graphs)
    assert all(map(equal, results, again))


def test_passes_are_captured_as_graphs(lora: Lora) -> None:
    jobs = jobs_over(lora, 3)
    results = [train_together(lora, jobs) for _ in range(3)]
    shared = SharedPass.of(lora, graphs=True)
    assert shared._graphs is not None
    assert not shared._graphs._refused
    assert any(shared._graphs._graphs.values())
    for one, other in zip(results[0], results[2], strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3)


def test_an_adapter_with_nan_fails_alone(lora: Lora) -> None:
    jobs = jobs_over(lora, 4)
    name = next(iter(jobs[1].weights))
    broken = jobs[1].weights | {name: torch.full_like(jobs[1].weights[name], float("nan"))}
    for _ in range(3):
        with_nan = train_together(lora, [jobs[0], replace(jobs[1], weights=broken), *jobs[2:]])
        without = train_together(lora, jobs)
    assert all(loss != loss for loss in with_nan[1].losses)  # noqa: PLR0124 - NaN
    assert [equal(one, other) for one, other in zip(with_nan, without, strict=True)] == [True, False, True, True]


def test_sub_passes_change_only_the_last_bits(lora: Lora) -> None:
    jobs = jobs_over(lora, 4)
    for job, one, other in zip(
        jobs, train_together(lora, jobs, pass_tokens=128), train_together(lora, jobs), strict=True
    ):
        assert_like(one, other, job)


def test_states_stay_on_the_device_and_results_are_on_the_host(lora: Lora) -> None:
    job = jobs_over(lora, 1, like_base=1)[0]
    passes = GatheredPasses()

    def trained(weights: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor] | None) -> TrainResult:
        return passes.train(lora, weights, optimizer, job.schedule, job.config, None, lambda: None)

    for _ in range(3):  # computed, captured, replayed
        first = trained(dict(job.weights), None)
    assert {tensor.device.type for tensor in (first.weights | first.optimizer).values()} == {"cpu"}
    assert equal(first, train_together(lora, [job])[0])
    hot = SharedPass.of(lora, graphs=True).hot
    assert hot.get([first.weights[name] for name in sorted(first.weights)]) is not None
    from_device = trained(first.weights, first.optimizer)
    copies = [{name: tensor.clone() for name, tensor in part.items()} for part in (first.weights, first.optimizer)]
    from_host = trained(copies[0], copies[1])
    assert equal(from_device, from_host)
    rows = job.schedule[0]
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            passes.token_losses(lora, first.weights, rows, 2, None, lambda: None),
            passes.token_losses(lora, copies[0], rows, 2, None, lambda: None),
            strict=True,
        )
    )


def test_fused_layers_compute_what_the_layers_compute(lora: Lora, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    jobs = jobs_over(lora, 3, like_base=1)
    fused = train_together(lora, jobs, graphs=False)
    kinds = {type(module).__name__.removeprefix("Llama") for module, _ in lora.model.__dict__[fused_layers._KEPT]}
    assert kinds == {"RMSNorm", "MLP"}
    monkeypatch.setattr(fused_layers, "_liger", dict)
    for job, one, other in zip(jobs, fused, train_together(lora, jobs, graphs=False), strict=True):
        assert_like(one, other, job)


def test_schedules_of_several_rounds_and_of_unequal_lengths(lora: Lora) -> None:
    """States go from round to round on the device; an adapter with fewer steps leaves, the others go on."""
    jobs = [
        replace(job, schedule=[job.schedule[0]] * steps)
        for job, steps in zip(jobs_over(lora, 3), (20, 3, 5), strict=True)
    ]
    passes = GatheredPasses(most_adapters=3, wait_s=5.0)

    def of_thread(job: AdapterJob) -> TrainResult:
        with passes.joining():
            return passes.train(lora, job.weights, None, job.schedule, job.config, None, lambda: None)

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(of_thread, jobs))
    for job, result in zip(jobs, results, strict=True):
        assert len(result.losses) == len(job.schedule)
        assert result.losses == pytest.approx(train_together(lora, [job])[0].losses, rel=2e-2)
