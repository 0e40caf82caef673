"""Many adapters in one pass: each is trained as PEFT and `train` train it alone, and none touches another."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from perennial.learner.bases import frozen_weights
from perennial.learner.bases.frozen_weights import cast_layers_once, cast_once
from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.lora import Lora, LoraConfig, Tensors
from perennial.learner.model.loss import OutOfMemoryError, training_losses
from perennial.learner.model.tokenization import TokenRow
from perennial.learner.together import shared_pass, stacked_lora
from perennial.learner.together import train_together as together_module
from perennial.learner.together.packing import AdapterRows, Size, pack
from perennial.learner.together.shared_pass import SharedPass, packs_together
from perennial.learner.together.stacked_lora import Layout
from perennial.learner.together.train_together import AdapterJob, train_together
from perennial.learner.training.trainer import TrainConfig, TrainResult, train
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft about GPT-2
PLAN = TrainConfig(learning_rate=5e-3, clip_norm=0.5, pad=2, warmup_steps=2)
SIZES: dict[str, Any] = {"vocab_size": 261, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
MODELS = {
    "llama": None,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **WIDTHS, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, **WIDTHS, num_key_value_heads=2, head_dim=8, sliding_window=5)
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **WIDTHS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
}


def lora_over(name: str, rank: int = 4) -> Lora:
    make_deterministic(1)
    made = tiny.base()
    build = MODELS[name]
    if build is not None:
        torch.manual_seed(0)
        made = Base(build().eval().requires_grad_(False), made.tokenizer, name, f"sha256:{name:0>64}", made.device,
                    made.dtype, 256)  # fmt: skip
    return Lora(made, LoraConfig(rank, 2 * rank))


def ragged(count: int, rng: random.Random, like_base: int = 0) -> list[TokenRow]:
    """Return rows of 5 to 39 tokens, some of them trained from later on, the last ones towards the base."""
    return [
        TokenRow(
            tuple(rng.randrange(3, 260) for _ in range(rng.randrange(5, 40))), rng.randrange(1, 4),
            like_base=index >= count - like_base,
        )
        for index in range(count)
    ]  # fmt: skip


def trained_weights(lora: Lora, name: str, seed: int = 5) -> Tensors:
    """Return weights whose B is not zero, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in lora.initial_weights(name, seed).items()
    }


def jobs_over(lora: Lora, count: int = 4, like_base: int = 1) -> list[AdapterJob]:
    """Return jobs of 4, 3, 2, 4, … steps: some adapters are finished before others."""
    rng = random.Random(3)
    return [
        AdapterJob(
            trained_weights(lora, f"a{index}", index), None,
            [ragged(3 + index, rng, like_base) for _ in range(4 - index % 3)],
            replace(PLAN, learning_rate=5e-3 / (1 + index % 2)),
        )
        for index in range(count)
    ]  # fmt: skip


def alone(lora: Lora, job: AdapterJob) -> TrainResult:
    return train(lora, job.weights, job.optimizer, job.schedule, job.config)


def assert_like(one: TrainResult, other: TrainResult, tolerance: float = 1e-5) -> None:
    """Assert that two results are equal but for the last bits.

    The first steps of AdamW are about as long as the rate, whatever the gradient: weights are compared by the moments.
    """
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    assert one.norms == pytest.approx(other.norms, rel=10 * tolerance)
    assert one.tokens == other.tokens
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, tensor in one.optimizer.items():
        assert_near(tensor, other.optimizer[name], 10 * tolerance)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(tensor, other.weights[name], rtol=1e-3, atol=1e-4)


def assert_near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    assert float((one - other).norm()) <= tolerance * float(other.norm())


def assert_equal(one: TrainResult, other: TrainResult) -> None:
    assert (one.losses, one.norms, one.tokens) == (other.losses, other.norms, other.tokens)
    for name, tensor in (one.weights | one.optimizer).items():
        assert torch.equal(tensor, (other.weights | other.optimizer)[name]), name


@contextmanager
def as_on_a_gpu(lora: Lora) -> Iterator[None]:
    """Fill passes up to few sizes and group products, which is otherwise done on CUDA only."""
    shared = SharedPass.of(lora, graphs=True)
    shared._fills = True
    grouped, stacked_lora._groups_on_device = stacked_lora._groups_on_device, lambda *_: True
    try:
        yield
    finally:
        shared._fills = False
        stacked_lora._groups_on_device = grouped


def gradients_of_peft(
    lora: Lora, weights: Tensors, rows: Sequence[TokenRow], like_base_weight: float
) -> tuple[float, Tensors]:
    """Return loss and gradients by PEFT's layers and autograd."""
    lora.load(weights)
    lora.select()
    for parameter in lora.parameters.values():
        parameter.grad = None
    ordered = sorted(rows, key=lambda row: row.like_base)
    losses, divergences = training_losses(lora, ordered, torch.device("cpu"), 2, packed=False)
    loss = losses.mean() + (like_base_weight * divergences.mean() if len(divergences) else 0.0)
    loss.backward()
    return float(loss.detach()), {
        name: parameter.grad.clone() for name, parameter in lora.parameters.items() if parameter.grad is not None
    }


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_peft(name: str, grouped: bool) -> None:
    lora = lora_over(name)
    assert packs_together(lora)
    rng = random.Random(1)
    of_adapter = [ragged(count, rng, like_base=1) for count in (3, 2, 4)]
    weights = [trained_weights(lora, f"a{index}") for index in range(3)]
    expected = [
        gradients_of_peft(lora, own, rows, PLAN.like_base_weight) for own, rows in zip(weights, of_adapter, strict=True)
    ]
    run = together_module._Together(
        lora, [AdapterJob(own, None, [rows], PLAN) for own, rows in zip(weights, of_adapter, strict=True)],
        4096, graphs=True, on_device=False,
    )  # fmt: skip
    parts = [together_module._adapter_rows(rows, PLAN) for rows in of_adapter]
    if grouped:
        with as_on_a_gpu(lora):
            losses, gradients_of_all = run._accumulate(parts)
    else:
        losses, gradients_of_all = run._accumulate(parts)
    assert losses.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    for row, (_, gradients) in enumerate(expected):
        views = Layout.of(lora).views(gradients_of_all[row])
        assert gradients.keys() == views.keys()
        for key, gradient in gradients.items():
            assert_near(views[key], gradient, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_peft(name: str) -> None:
    lora = lora_over(name)
    rows = [ragged(2, random.Random(index)) for index in range(3)]
    packed = pack([AdapterRows(of_adapter, 1.0, 1.0, 2) for of_adapter in rows])
    stacked = stacked_lora.StackedLora(lora, 3)
    for row in range(3):
        weights = trained_weights(lora, f"a{row}")
        stacked.weights[row] = torch.cat([weights[key].flatten() for key in stacked.layout.names])
    stacked.take(packed.bounds, packed.ends)
    with torch.no_grad(), stacked.computing(adapted=True):
        hidden = shared_pass._hidden(lora, packed)
    start = 0
    for row, of_adapter in enumerate(rows):
        lora.load(trained_weights(lora, f"a{row}"))
        lora.select()
        start = packed.bounds[row]
        for document in of_adapter:
            with torch.no_grad():
                body = lora.model.base_model(input_ids=torch.tensor([document.ids]), use_cache=False)
            there = hidden[start : start + len(document.ids)]
            torch.testing.assert_close(there, body.last_hidden_state[0], rtol=1e-4, atol=1e-5)
            start += len(document.ids)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_one_adapter_is_that_of_train(name: str) -> None:
    lora = lora_over(name)
    job = AdapterJob(trained_weights(lora, "a"), None, [ragged(5, random.Random(2), like_base=2)], PLAN)
    assert_like(train_together(lora, [job])[0], alone(lora, job))


@pytest.mark.parametrize("grouped", [False, True])
def test_several_adapters_are_each_trained_as_alone(grouped: bool) -> None:
    lora = lora_over("llama", rank=8)
    jobs = jobs_over(lora)
    if grouped:
        with as_on_a_gpu(lora):
            results = train_together(lora, jobs)
    else:
        results = train_together(lora, jobs)
    for job, result in zip(jobs, results, strict=True):
        assert_like(result, alone(lora, job))
        assert len(result.losses) == len(job.schedule)


def test_the_shipped_base_trains_adapters_together() -> None:
    make_deterministic(1)
    lora = Lora(load_base(device="cpu"), LoraConfig(8, 16))
    jobs = jobs_over(lora, 3)
    for job, result in zip(jobs, train_together(lora, jobs), strict=True):
        assert_like(result, alone(lora, job), 1e-4)


def test_moments_are_carried_on() -> None:
    lora = lora_over("llama")
    jobs = jobs_over(lora)
    first = train_together(lora, [replace(job, schedule=job.schedule[:1]) for job in jobs])
    more = train_together(
        lora,
        [
            replace(job, weights=result.weights, optimizer=result.optimizer, schedule=job.schedule[1:])
            for job, result in zip(jobs, first, strict=True)
        ],
    )
    for whole, half, rest in zip(train_together(lora, jobs), first, more, strict=True):
        assert_like(rest.after(half), whole)


def test_the_same_pass_gives_the_same_bits() -> None:
    lora = lora_over("llama")
    jobs = jobs_over(lora)
    for one, two in zip(train_together(lora, jobs), train_together(lora, jobs), strict=True):
        assert_equal(one, two)


def test_an_adapter_with_nan_fails_alone() -> None:
    lora = lora_over("llama")
    jobs = jobs_over(lora)
    broken = dict(jobs[1].weights)
    name = next(iter(broken))
    broken[name] = torch.full_like(broken[name], float("nan"))
    with_nan = train_together(lora, [jobs[0], replace(jobs[1], weights=broken), *jobs[2:]])
    assert all(loss != loss for loss in with_nan[1].losses)  # noqa: PLR0124 - NaN
    for index, result in enumerate(train_together(lora, jobs)):
        if index != 1:
            assert_equal(result, with_nan[index])


def test_what_the_slots_held_stays_and_other_users_see_the_base_as_before() -> None:
    lora = lora_over("llama")
    lora.load(trained_weights(lora, "held"))
    before = lora.weights()
    forwards = [layer.forward for layer in lora.layers().values()]
    implementation = lora.model.config._attn_implementation
    train_together(lora, jobs_over(lora))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.weights().items())
    assert [layer.forward for layer in lora.layers().values()] == forwards
    assert lora.model.config._attn_implementation == implementation
    assert not lora.model.get_input_embeddings()._forward_hooks


def test_passes_are_bounded_by_tokens_and_change_only_the_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama")
    jobs = jobs_over(lora)
    sizes: list[int] = []
    run = SharedPass.run

    def watched(self: SharedPass, weights: torch.Tensor, parts: Sequence[AdapterRows]) -> Any:
        sizes.append(sum(len(row.ids) for part in parts for row in part.rows))
        return run(self, weights, parts)

    monkeypatch.setattr(SharedPass, "run", watched)
    whole = train_together(lora, jobs)
    assert len(sizes) == 4
    sizes.clear()
    for one, other in zip(train_together(lora, jobs, pass_tokens=50), whole, strict=True):
        assert_like(one, other)
    assert len(sizes) > 10
    assert max(sizes) <= 50


def test_memory_that_runs_out_halves_the_passes_and_then_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama")
    jobs = jobs_over(lora)
    whole = train_together(lora, jobs)
    run = SharedPass.run
    most = {"tokens": 100}

    def short(self: SharedPass, weights: torch.Tensor, parts: Sequence[AdapterRows]) -> Any:
        if sum(len(row.ids) for part in parts for row in part.rows) > most["tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, weights, parts)

    monkeypatch.setattr(SharedPass, "run", short)
    for one, other in zip(train_together(lora, jobs), whole, strict=True):
        assert_like(one, other)
    most["tokens"] = 4
    with pytest.raises(OutOfMemoryError, match="one row at a time"):
        train_together(lora, jobs)
    most["tokens"] = 10_000
    stacked = together_module.StackedAdamW

    def of_two(weights: torch.Tensor, *moments: torch.Tensor) -> Any:
        if len(weights) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stacked(weights, *moments)

    monkeypatch.setattr(together_module, "StackedAdamW", of_two)
    for one, other in zip(train_together(lora, jobs), whole, strict=True):
        assert_like(one, other)


def test_a_model_that_cannot_be_packed_is_trained_one_by_one() -> None:
    """Gemma 2 caps its attention's and its head's logits, which packed passes do not do."""
    make_deterministic(1)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **WIDTHS, num_key_value_heads=2, head_dim=8)).eval()
    made = tiny.base()
    lora = Lora(replace(made, model=model.requires_grad_(False)), LoraConfig(4, 8))
    assert not packs_together(lora)
    jobs = jobs_over(lora, 2)
    for job, result in zip(jobs, train_together(lora, jobs), strict=True):
        assert_equal(result, alone(lora, job))


def test_rounding_to_bf16_is_no_reason_to_train_one_by_one() -> None:
    """Hidden states of a real model are so large that bf16 rounds them by more than packing may change them."""
    torch.manual_seed(0)
    sizes = {**WIDTHS, "num_hidden_layers": 8, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **sizes)).eval().requires_grad_(False)
    made = tiny.base()
    base = Base(model, made.tokenizer, "large", f"sha256:{0:0>64}", made.device, made.dtype, 256, torch.bfloat16)
    assert packs_together(Lora(base, LoraConfig(4, 8)))


@pytest.mark.parametrize(("share", "wanted"), [(0.1, True), (0.5, False)])
def test_a_base_in_bf16_may_differ_by_its_rounding_and_by_no_more(
    share: float, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where rows of a real model that see each other differ by .9 of their norm."""
    made = tiny.base(dtype=torch.bfloat16)
    lora = Lora(made, LoraConfig(4, 8))
    hidden = shared_pass._hidden
    monkeypatch.setattr(shared_pass, "_hidden", lambda *given: hidden(*given) * (1 + share))
    assert packs_together(lora) is wanted


def test_a_filled_pass_has_the_shapes_of_its_size() -> None:
    rng = random.Random(9)
    parts = [AdapterRows(ragged(count, rng, 1), 0.5, 0.25, 2) for count in (3, 2, 5)]
    size = Size.holding(parts)
    filled, bare = pack(parts, size), pack(parts)
    assert len(filled.ids) == size.tokens
    assert len(filled.ends) == size.adapters == 4
    assert len(filled.lengths) == len(filled.starts) - 1 == size.documents
    assert sum(filled.lengths) == size.tokens
    assert max(filled.lengths) <= filled.longest == size.longest
    assert len(filled.labels) == size.text + size.like_base
    assert float(filled.weights.sum()) == pytest.approx(float(bare.weights.sum()))
    assert filled.tokens == bare.tokens < size.tokens
    assert all(end % 8 == 0 for end in filled.bounds)
    assert all(start < end for start, end in zip(filled.bounds, filled.bounds[1:], strict=False))
    again = [AdapterRows(ragged(count, rng, 1), 0.5, 0.25, 2) for count in (3, 2, 5)]
    assert Size.holding(again).adapters == 4


def test_rows_of_adapters_keep_their_order_and_their_documents_apart() -> None:
    rows = [TokenRow((5, 6, 7), 2), TokenRow((8, 9))]
    packed = pack([AdapterRows(rows, 1.0, 1.0, 2), AdapterRows((), 1.0, 1.0, 2)])
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 2, 2, 2] + [2] * 8
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, *range(8)]
    assert packed.predicting.tolist() == [1, 3]
    assert packed.labels.tolist() == [7, 9]
    assert packed.bounds == (0, 8, 16)
    assert packed.gathered_from.tolist() == [2, 0, 2, 1] + [2] * 12


def test_layers_with_weights_that_are_cast_once_compute_the_bits_of_autocast() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4, bias=False))
    model.requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)

    def computed() -> list[torch.Tensor]:
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)
        return [plain, cast, *torch.autograd.grad(cast.float().sum(), x)]

    before = computed()
    cast_layers_once(model)
    casts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_weights, "cast_once", lambda *given: casts.append(given) or cast_once(*given))
        after = computed()
    assert [tensor.dtype for tensor in after] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert len(casts) == 3, "two weights and a bias, inside autocast alone"


def test_frozen_weights_are_cast_once_and_again_after_a_change() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
    assert cast_once(weight, torch.float32) is weight
    kept = cast_once(weight, torch.bfloat16)
    assert cast_once(weight, torch.bfloat16) is kept
    torch.testing.assert_close(kept, weight.to(torch.bfloat16), rtol=0, atol=0)
    weight.mul_(2)
    torch.testing.assert_close(cast_once(weight, torch.bfloat16), weight.to(torch.bfloat16), rtol=0, atol=0)


def test_a_step_in_bf16_casts_no_frozen_weight_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama").computing_in(torch.bfloat16)
    job = jobs_over(lora, 1)[0]
    first = train_together(lora, [job])[0]
    frozen = {layer.base_layer.weight.data_ptr() for layer in lora.layers().values()}
    cast: list[torch.Size] = []
    to = torch.Tensor.to

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if tensor.data_ptr() in frozen:
            cast.append(tensor.shape)
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    again = train_together(lora, [job])[0]
    assert not cast
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, again.weights[name])


@pytest.mark.parametrize("count", [1, 3])
def test_halves_of_a_pass_in_two_threads_change_only_the_last_bits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama")
    jobs = jobs_over(lora, 3)[-count:]  # a pass of three rows is computed whole
    whole = train_together(lora, jobs)
    monkeypatch.setattr(shared_pass, "_LEAST_PARAMETERS", 0)
    lora.model.__dict__.pop("_shared_passes")
    make_deterministic(2)
    try:
        halves = train_together(lora, jobs)
        assert len(SharedPass.of(lora, graphs=True)._stacked) == 2
        again = train_together(lora, jobs)
        assert torch.get_num_threads() == 2
    finally:
        make_deterministic(1)
    for one, other, third in zip(whole, halves, again, strict=True):
        assert_like(other, one)
        assert third.losses == other.losses
        for name, tensor in other.weights.items():
            assert torch.equal(tensor, third.weights[name])
    assert not any("forward" in layer.__dict__ for layer in lora.layers().values())


def test_an_error_in_one_half_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_over("llama")
    job = jobs_over(lora, 3)[-1]
    monkeypatch.setattr(shared_pass, "_LEAST_PARAMETERS", 0)
    attention = lora.model.config._attn_implementation
    compute = shared_pass._with_gradients

    def failing(over: Lora, stacked: Any, inputs: Any, base: torch.Tensor | None) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise ArithmeticError("the second half")
        return compute(over, stacked, inputs, base)

    monkeypatch.setattr(shared_pass, "_with_gradients", failing)
    lora.model.__dict__.pop("_shared_passes", None)
    make_deterministic(2)
    try:
        with pytest.raises(ArithmeticError):
            train_together(lora, [job])
        assert torch.get_num_threads() == 2
    finally:
        make_deterministic(1)
    assert lora.model.config._attn_implementation == attention
    assert not any("forward" in layer.__dict__ for layer in lora.layers().values())


def test_adapters_of_one_row_each_are_spread_over_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pass, "_LEAST_PARAMETERS", 0)
    parts = [AdapterRows(ragged(1, random.Random(index)), 1.0, 1.0, 2) for index in range(4)]
    run = SharedPass(lora_over("llama"), graphs=False)
    make_deterministic(2)
    try:
        halves = run._halves(parts)
    finally:
        make_deterministic(1)
    assert halves is not None
    assert [[len(part.rows) for part in half] for half in halves] == [[1, 0, 1, 0], [0, 1, 0, 1]]
