"""Decoding with a cache gives what the whole text gives, however prompts are batched."""

from __future__ import annotations

import pytest
import torch

from perennial.learner.model.generation import Decoded, Sampling, decode
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.tokenization import ExampleTokenizer
from tests import tiny

PROMPTS = ("a", "which bird sings in the tree", "how long", "why")


@pytest.fixture(scope="module")
def lora() -> Lora:
    slot = Lora(tiny.trained([f"the blue parrot {n} sings at noon" for n in range(6)]), LoraConfig(4, 8))
    generator = torch.Generator().manual_seed(1)
    slot.load({name: torch.randn(shape, generator=generator) * 0.2 for name, shape in slot.shapes.items()})
    return slot


def run(lora: Lora, prompts, **more) -> list[Decoded]:
    codec = ExampleTokenizer(lora.base.tokenizer)
    ids = [codec.prompt_ids(prompt, 96) for prompt in prompts]
    given = {"max_tokens": 20, "stop": {codec.eos}, "pad": codec.pad, "adapted": True, **more}
    return decode(lora, ids, **given)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(lora: Lora, adapted: bool) -> None:
    together = run(lora, PROMPTS, adapted=adapted)
    assert together == [run(lora, [prompt], adapted=adapted)[0] for prompt in PROMPTS]
    assert run(lora, PROMPTS, adapted=adapted, max_rows=3) == together
    assert together != run(lora, PROMPTS, adapted=not adapted)


def test_the_cache_gives_what_the_whole_text_gives(lora: Lora) -> None:
    codec = ExampleTokenizer(lora.base.tokenizer)
    ids = list(codec.prompt_ids(PROMPTS[1], 96))
    made = run(lora, [PROMPTS[1]])[0]
    for token in made.ids:
        with torch.no_grad():
            assert int(lora.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_rows_that_end_leave_the_others_as_they_are(lora: Lora) -> None:
    whole = run(lora, PROMPTS, stop=set())
    first = [answer.ids[1] for answer in whole[:3]]
    some = run(lora, PROMPTS, stop=set(first))
    for answer, known in zip(some, whole, strict=True):
        cut = next((at for at, token in enumerate(known.ids) if token in first), None)
        assert answer == Decoded(known.ids[:cut], cut is not None)


def test_samples_are_seeded(lora: Lora) -> None:
    def sampled(seed: int) -> list[Decoded]:
        return run(lora, PROMPTS, sampling=Sampling(1.0, torch.Generator().manual_seed(seed)))

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_an_overflow_ends_the_answer_and_is_told(lora: Lora) -> None:
    before = lora.weights()
    try:
        lora.load({name: torch.full(shape, 1e30) for name, shape in lora.shapes.items()})
        assert run(lora, PROMPTS) == [Decoded((), ended=False, finite=False)] * len(PROMPTS)
    finally:
        lora.load(before)


def test_the_lock_is_held_for_each_token_alone(lora: Lora) -> None:
    class Counting:
        entered = held = 0

        def __enter__(self) -> None:
            self.entered += 1
            self.held += 1

        def __exit__(self, *_: object) -> None:
            self.held -= 1

    lock, seen = Counting(), []
    run(lora, ["a"], lock=lock, stop=set(), on_step=lambda: seen.append(lock.held))
    assert lock.entered == 20
    assert seen == [0] * 20
