"""Adapter weights: slots that do not disturb each other, PEFT's own file format, and hostile bytes."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from perennial.learner.model.lora import (
    AdapterError,
    Lora,
    LoraConfig,
    Tensors,
    from_safetensors,
    is_finite,
    is_noop,
    load_tensors,
    to_safetensors,
)
from perennial.storage.errors import IntegrityError
from tests import tiny

CONFIG = LoraConfig(rank=4, alpha=8)
IDS = torch.tensor([[0, 20, 30, 40, 50]])  # (B, T)


def perturbed(lora: Lora, seed: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in lora.shapes.items()}


def logits(lora: Lora) -> torch.Tensor:
    with torch.no_grad():
        return lora.model(input_ids=IDS, use_cache=False).logits  # (B, T, V)


def test_a_new_adapter_changes_nothing_and_is_known_as_a_no_op() -> None:
    plain = tiny.base()
    with torch.no_grad():
        before = plain.model(input_ids=IDS, use_cache=False).logits
    lora = Lora(plain, CONFIG)
    lora.load(lora.initial_weights("acme/support", 0))
    lora.select()
    assert torch.equal(logits(lora), before)
    assert is_noop(lora.weights())
    assert not is_noop(perturbed(lora))


def test_first_weights_follow_from_base_adapter_and_seed() -> None:
    one, same, other = Lora(tiny.base(), CONFIG), Lora(tiny.base(), CONFIG), Lora(tiny.base(1), CONFIG)
    first = to_safetensors(one.initial_weights("a", 0))
    assert first == to_safetensors(same.initial_weights("a", 0))
    assert (
        len(
            {
                first,
                *(
                    to_safetensors(s)
                    for s in (one.initial_weights("b", 0), one.initial_weights("a", 1), other.initial_weights("a", 0))
                ),
            }
        )
        == 4
    )


def test_every_linear_layer_but_the_head_is_adapted() -> None:
    lora = Lora(tiny.base(), CONFIG)
    adapted = {name.split(".lora_")[0] for name in lora.shapes}
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)


def test_slots_over_one_base_do_not_disturb_each_other_or_the_base() -> None:
    base = tiny.base()
    with torch.no_grad():
        plain = base.model(input_ids=IDS, use_cache=False).logits
    learner, scorer = Lora(base, CONFIG), Lora(base, CONFIG, slot="scorer")
    learner.load(perturbed(learner, 1))
    scorer.load(perturbed(scorer, 2))
    learner.select()
    first = logits(learner)
    scorer.select()
    assert not torch.equal(logits(scorer), first)
    with learner.disabled():
        assert torch.equal(logits(learner), plain)
    learner.select()
    assert torch.equal(logits(learner), first)
    assert Lora(base, CONFIG).weights().keys() == learner.weights().keys()


def test_a_selected_slot_stays_selected_until_another_is() -> None:
    base = tiny.base()
    one, other = Lora(base, CONFIG), Lora(base, CONFIG, slot="other")
    one.load(perturbed(one, 1))
    other.load(perturbed(other, 2))
    one.select()
    first = logits(one)
    with one.disabled():
        assert not torch.equal(logits(one), first)
    assert torch.equal(logits(one), first)
    other.select()
    assert not torch.equal(logits(one), first)
    assert not any(parameter.requires_grad for parameter in one.parameters.values())
    assert all(parameter.requires_grad for parameter in other.parameters.values())


def test_a_bf16_base_keeps_the_adapter_in_fp32() -> None:
    lora = Lora(tiny.base(dtype=torch.bfloat16), CONFIG)
    assert {parameter.dtype for parameter in lora.parameters.values()} == {torch.float32}
    lora.select()
    assert torch.isfinite(logits(lora)).all()


def test_stored_bytes_are_a_peft_adapter(tmp_path: Path) -> None:
    lora = Lora(tiny.base(), CONFIG)
    state = perturbed(lora)
    lora.load(state)
    lora.select()
    ours = logits(lora)
    (tmp_path / "adapter_model.safetensors").write_bytes(to_safetensors(state))
    (tmp_path / "adapter_config.json").write_bytes(lora.adapter_config())
    assert json.loads(lora.adapter_config())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(tiny.base().model, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS, use_cache=False).logits, ours)


def test_a_state_survives_its_bytes() -> None:
    lora = Lora(tiny.base(), CONFIG)
    state = perturbed(lora)
    again = from_safetensors(to_safetensors(state), lora.shapes)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert to_safetensors(again) == to_safetensors(dict(reversed(state.items())))


def test_weights_of_another_shape_or_name_are_refused() -> None:
    lora = Lora(tiny.base(), CONFIG)
    wide = Lora(tiny.base(), LoraConfig(rank=8, alpha=16))
    with pytest.raises(AdapterError, match="another shape"):
        from_safetensors(to_safetensors(perturbed(wide)), lora.shapes)
    state = perturbed(lora)
    state.pop(next(iter(state)))
    with pytest.raises(AdapterError, match="other tensors"):
        lora.load(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    state = perturbed(Lora(tiny.base(), CONFIG))
    next(iter(state.values()))[0, 0] = value
    assert not is_finite(state)
    with pytest.raises(IntegrityError, match="finite fp32"):
        load_tensors(to_safetensors(state))


def test_other_dtypes_and_excess_size_are_refused() -> None:
    data = save_safetensors({"x": torch.zeros(4, dtype=torch.float16)})
    with pytest.raises(IntegrityError, match="finite fp32"):
        load_tensors(data)
    with pytest.raises(IntegrityError, match="too large"):
        load_tensors(data, max_bytes=8)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(min_value=0, max_value=400))
def test_damaged_bytes_are_refused_and_nothing_else_is_raised(junk: bytes, cut: int) -> None:
    whole = save_safetensors({"x": torch.ones(8), "y": torch.ones(4)})
    for data in (junk, whole[: min(cut, len(whole) - 1)], junk + whole[len(junk) :] if junk else b""):
        try:
            load_tensors(data)
        except IntegrityError:
            continue
        assert data != whole[:-1]


def test_one_process_has_one_rank_per_slot() -> None:
    base = tiny.base()
    Lora(base, CONFIG)
    with pytest.raises(AdapterError, match="one rank per process"):
        Lora(base, LoraConfig(rank=8, alpha=8))
