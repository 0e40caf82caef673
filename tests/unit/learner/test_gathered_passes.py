"""Requests of several threads are computed together: each gets what it would get alone, and none waits for ever."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from perennial.learner.model.lora import AdapterError, Lora
from perennial.learner.model.loss import row_token_losses
from perennial.learner.model.turns import ComputeTurns, FairLock
from perennial.learner.together import gathered_passes, shared_pass
from perennial.learner.together import measure_together as measuring
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.together.measure_together import MeasuredRows, measure_together
from perennial.learner.together.train_together import AdapterJob
from perennial.learner.training.trainer import TrainResult
from tests.unit.learner.test_train_together import (
    MODELS,
    alone,
    assert_equal,
    assert_like,
    jobs_over,
    lora_over,
    ragged,
    trained_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft about GPT-2
WAIT_S = 20.0


def run(passes: GatheredPasses, lora: Lora, job: AdapterJob, on_step: Callable[[], None] = lambda: None) -> TrainResult:
    lock = ComputeTurns(FairLock(), 1)
    return passes.train(lora, job.weights, job.optimizer, job.schedule, job.config, lock, on_step)


def gathered(passes: GatheredPasses, lora: Lora, jobs: list[AdapterJob]) -> list[TrainResult | Exception]:
    """Train each job in a thread of its own, all of them at once, with a lock that they share."""
    lock, barrier = FairLock(), threading.Barrier(len(jobs))

    def of_thread(number: int) -> TrainResult | Exception:
        slot = Lora(lora.base, lora.config, f"slot{number}")
        turns, job = ComputeTurns(lock, 1), jobs[number]
        with passes.joining():
            barrier.wait(WAIT_S)
            try:
                return passes.train(slot, job.weights, job.optimizer, job.schedule, job.config, turns, lambda: None)
            except AdapterError as error:
                return error

    for number in range(len(jobs)):  # peft's layers are put in before other threads compute
        Lora(lora.base, lora.config, f"slot{number}")
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(of_thread, range(len(jobs))))


def test_one_thread_computes_the_same_bits_in_rounds_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama")
    job = jobs_over(lora)[0]
    monkeypatch.setitem(gathered_passes.ROUND_STEPS, "cpu", 1)
    in_rounds = run(GatheredPasses(16, WAIT_S), lora, job)
    for name, weights in lora.weights().items():
        assert torch.equal(weights, in_rounds.weights[name]), "the slot holds the new weights"
    assert_equal(in_rounds, run(GatheredPasses(), lora, job))
    assert in_rounds.adapters == 1
    assert_like(in_rounds, alone(lora, job))


def test_threads_train_together_and_each_gets_its_own_result() -> None:
    lora = lora_over("llama")
    jobs, rounds = jobs_over(lora), []
    results = gathered(GatheredPasses(16, WAIT_S, report=lambda adapters, _: rounds.append(adapters)), lora, jobs)
    for job, result in zip(jobs, results, strict=True):
        assert isinstance(result, TrainResult)
        assert_like(result, alone(lora, job))
        assert result.adapters == len(jobs)
    assert rounds[0] == len(jobs)
    assert rounds == sorted(rounds, reverse=True), "adapters with fewer steps leave earlier"


def test_no_round_has_more_adapters_than_allowed() -> None:
    lora = lora_over("llama")
    rounds: list[int] = []
    results = gathered(
        GatheredPasses(2, 0.0, report=lambda adapters, _: rounds.append(adapters)), lora, jobs_over(lora)
    )
    assert all(isinstance(result, TrainResult) for result in results)
    assert max(rounds) <= 2


def test_an_adapter_with_nan_or_with_the_wrong_tensors_fails_alone() -> None:
    lora = lora_over("llama")
    good, nan, wrong, other = jobs_over(lora)
    nan = replace(nan, weights={name: tensor * math.nan for name, tensor in nan.weights.items()})
    wrong = replace(wrong, weights={"other": torch.zeros(1)})
    results = gathered(GatheredPasses(16, WAIT_S), lora, [good, nan, wrong, other])
    for job, result in ((good, results[0]), (other, results[3])):
        assert isinstance(result, TrainResult)
        assert_like(result, alone(lora, job))
    assert isinstance(results[1], TrainResult)
    assert all(map(math.isnan, results[1].losses))
    assert isinstance(results[2], AdapterError)


def test_a_thread_that_is_to_stop_leaves_the_others_to_go_on() -> None:
    """Whichever of the threads computes the round: its end must not be the end of theirs."""
    lora = lora_over("llama")
    jobs = [replace(job, schedule=list(job.schedule) * 4) for job in jobs_over(lora)]
    passes, lock, barrier = GatheredPasses(16, WAIT_S), FairLock(), threading.Barrier(len(jobs))

    class StopError(Exception):
        pass

    def of_thread(number: int) -> TrainResult | str:
        def on_step() -> None:
            if number % 2:
                raise StopError

        job, turns = jobs[number], ComputeTurns(lock, 1)
        slot = Lora(lora.base, lora.config, f"slot{number}")
        with passes.joining():
            barrier.wait(WAIT_S)
            try:
                return passes.train(slot, job.weights, job.optimizer, job.schedule, job.config, turns, on_step)
            except StopError:
                return "stopped"

    for number in range(len(jobs)):
        Lora(lora.base, lora.config, f"slot{number}")
    with ThreadPoolExecutor(len(jobs)) as pool:
        results = list(pool.map(of_thread, range(len(jobs))))
    assert results[1] == results[3] == "stopped"
    for number in (0, 2):
        result = results[number]
        assert isinstance(result, TrainResult)
        assert_like(result, alone(lora, jobs[number]), 1e-4)


def test_more_adapters_than_a_round_takes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short update does not wait for the end of a long one, also where a round takes only one adapter."""
    lora = lora_over("llama")
    long, short = jobs_over(lora)[:2]
    long = replace(long, schedule=list(long.schedule) * 15)
    monkeypatch.setitem(gathered_passes.ROUND_STEPS, "cpu", 1)
    ended: list[str] = []
    passes, lock, barrier = GatheredPasses(1, 0.0), FairLock(), threading.Barrier(2)
    slots = [Lora(lora.base, lora.config, f"slot{number}") for number in range(2)]

    def of_thread(number: int, name: str, job: AdapterJob) -> None:
        with passes.joining():
            barrier.wait(WAIT_S)
            turns = ComputeTurns(lock, 1)
            passes.train(slots[number], job.weights, job.optimizer, job.schedule, job.config, turns, lambda: None)
            ended.append(name)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(of_thread, (0, 1), ("long", "short"), (long, short)))
    assert ended == ["short", "long"]


def test_a_result_keeps_no_memory_of_other_adapters() -> None:
    lora = lora_over("llama")
    for result in gathered(GatheredPasses(16, WAIT_S), lora, jobs_over(lora)):
        assert isinstance(result, TrainResult)
        tensors = [*result.weights.values(), *result.optimizer.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(storages.values()) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("packs", [True, False])
def test_a_slot_holds_its_own_adapter_after_a_shared_measurement(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate then asks the slot: a model that cannot be packed measures all adapters in the slot of one thread."""
    monkeypatch.setattr(measuring, "packs_together", lambda _: packs)
    lora = lora_over("llama")
    passes, lock, barrier = GatheredPasses(2, WAIT_S), FairLock(), threading.Barrier(2)
    weights = [trained_weights(lora, name, number) for number, name in enumerate("ab")]
    rows = ragged(3, random.Random(7))
    slots = [Lora(lora.base, lora.config, f"slot{number}") for number in range(2)]

    def of_thread(number: int) -> list[torch.Tensor]:
        with passes.joining():
            barrier.wait(WAIT_S)
            turns = ComputeTurns(lock, 1)
            return passes.token_losses(slots[number], weights[number], rows, 2, turns, lambda: None)

    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(of_thread, range(2)))
    for number, slot in enumerate(slots):
        assert all(torch.equal(weights[number][name], tensor) for name, tensor in slot.weights().items())
        lora.load(weights[number])
        wanted = row_token_losses(lora, rows, pad=2, adapted=True)
        torch.testing.assert_close(torch.cat(losses[number]), torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_the_slots_of_a_process_do_not_decide_whether_two_threads_share_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That would give the same update other bits in another process."""
    lora = lora_over("llama")
    own = sum(weight.numel() for name, weight in lora.model.named_parameters() if ".lora_" not in name)
    Lora(lora.base, lora.config, "another")
    for least, wanted in ((own, True), (own + 1, False)):
        monkeypatch.setattr(shared_pass, "_LEAST_PARAMETERS", least)
        assert shared_pass.SharedPass(lora, graphs=False)._is_large is wanted


def test_a_round_waits_for_those_that_are_about_to_come_but_not_for_ever() -> None:
    lora = lora_over("llama")
    job = jobs_over(lora)[0]
    passes = GatheredPasses(16, 0.05)
    with passes.joining():  # another thread that never trains
        assert_like(run(passes, lora, job), alone(lora, job))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_losses_of_several_adapters_are_those_of_each_in_the_slot(name: str) -> None:
    lora = lora_over(name)
    rng = random.Random(7)
    rows = [ragged(5, rng), [], ragged(3, rng), ragged(4, rng)]
    weights = [trained_weights(lora, "a", 1), trained_weights(lora, "b", 2), trained_weights(lora, "c", 3), None]
    parts = [MeasuredRows(of_adapter, group) for of_adapter, group in zip(weights, rows, strict=True)]
    steps: list[int] = []
    measured = measure_together(lora, parts, 2, on_step=lambda: steps.append(1), pass_tokens=64)
    assert len(steps) > 1
    for part, losses in zip(parts, measured, strict=True):
        if part.weights is not None:
            lora.load(part.weights)
        wanted = row_token_losses(lora, part.rows, pad=2, adapted=part.weights is not None)
        assert len(losses) == len(wanted)
        for found, want in zip(losses, wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_measuring_halves_a_pass_that_does_not_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama")
    parts = [MeasuredRows(trained_weights(lora, name), ragged(4, random.Random(3))) for name in "ab"]
    wanted = measure_together(lora, parts, 2)
    measure, sizes = measuring.SharedPass.measure, []

    def within_60_tokens(self: measuring.SharedPass, weights: torch.Tensor, of_pass: list) -> torch.Tensor:
        tokens = sum(len(row.ids) for part in of_pass for row in part.rows)
        sizes.append(tokens)
        if tokens > 60:
            raise torch.OutOfMemoryError
        return measure(self, weights, of_pass)

    monkeypatch.setattr(measuring.SharedPass, "measure", within_60_tokens)
    measured = measure_together(lora, parts, 2)
    assert max(sizes) > 60
    for losses, want in zip(measured, wanted, strict=True):
        torch.testing.assert_close(torch.cat(losses), torch.cat(want), rtol=1e-5, atol=1e-5)
