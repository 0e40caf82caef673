"""Whole updates: what is held out, refused, recorded, and learned after all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perennial.learner.model.base import Base, load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.lora import Lora, LoraConfig, Tensors, to_safetensors
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.together.shared_pass import packs_together
from perennial.learner.training import gate, update
from perennial.learner.training.measuring import LossesBefore, Measurer, UpdateRows
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.state import TrainingState
from perennial.learner.training.trainer import TrainResult
from perennial.learner.training.update import Updater, UpdateResult
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings
from tests import tiny

RECIPE = replace(
    Recipe.of(Settings.of()), rank=4, alpha=8, learning_rate=5e-3, warmup_steps=2, steps=6, rows=8, row_tokens=32,
    replay_size=16, anchor_rows=4, max_general_rise_nats=10.0, held_out_share=0.25, gentler_tries=0, correction_passes=0,
    general_kl_weight=0.0,
)  # fmt: skip
GENERAL = [f"plain words number {number} about nothing" for number in range(12)]


def make(recipe: Recipe = RECIPE, anchor: list[str] = GENERAL, base: Base | None = None) -> Updater:
    make_deterministic(1)
    lora = Lora(base or tiny.base(), LoraConfig(recipe.rank, recipe.alpha))
    codec = ExampleTokenizer(lora.base.tokenizer)
    return Updater(lora, codec, GeneralText(GENERAL, anchor, codec, recipe.row_tokens), recipe, shared=GatheredPasses())


def first(updater: Updater) -> TrainingState:
    return TrainingState(updater.lora.initial_weights("acme/support", updater.recipe.seed))


def documents(count: int, start: int = 0) -> list[ExampleAccepted]:
    return [tiny.document(n, f"the blue parrot {n} sings in the tree at noon") for n in range(start, start + count)]


def run(
    updater: Updater,
    parent: TrainingState,
    examples: list[ExampleAccepted],
    cut: int = 1,
    on_step: Callable[[], None] = ignore_step,
) -> UpdateResult:
    def replayed(entry: ReplayEntry) -> list[TokenRow]:
        return text_rows(f"earlier {entry.example_id[-4:]}", updater.codec, updater.recipe.row_tokens)

    return updater.update(
        parent, examples, adapter="acme/support", cut=cut, batch="batch", replayed=replayed, on_step=on_step
    )


def test_an_update_learns_and_records_by_how_much() -> None:
    updater = make()
    done = run(updater, first(updater), documents(8))
    figures = done.gate
    assert (done.outcome, done.reason, figures.basis) == ("promoted", "ok", "held-out")
    assert figures.held_out_after < figures.held_out_before
    assert 1 <= figures.held_out_examples <= 4
    assert figures.anchor_base == pytest.approx(figures.anchor_before, abs=1e-5)
    assert {entry.example_id for entry in done.state.replay_index} == {f"{n:032x}" for n in range(8)}
    assert done.state.optimizer is not None


def test_held_out_examples_are_learned_too() -> None:
    updater = make()
    examples = documents(8)
    held = gate.hold_out([example.document_id for example in examples], RECIPE.held_out_share)
    parent = first(updater)
    done = run(updater, parent, examples)
    without = run(updater, parent, [example for n, example in enumerate(examples) if n not in held])
    assert held
    assert done.tokens > without.tokens - sum(row.tokens for e in examples for row in updater.rows(e))
    changed = [tiny.document(n, "wholly other text here") if n in held else e for n, e in enumerate(examples)]
    changed = [e.model_copy(update={"document_id": examples[n].document_id}) for n, e in enumerate(changed)]
    assert to_safetensors(run(updater, parent, changed).state.weights) != to_safetensors(done.state.weights)


@pytest.mark.parametrize("epochs", [1, 3])
def test_several_passes_over_held_out_examples_rehearse_those_of_the_same_update(epochs: int) -> None:
    """Held-out rows that are trained again and again would push out what was trained just before them."""
    updater, examples, asked = make(replace(RECIPE, epochs=epochs)), documents(8), set()
    by_id = {example.example_id: example for example in examples}

    def replayed(entry: ReplayEntry) -> list[TokenRow]:
        asked.add(entry.example_id)
        assert entry.batch == "batch"
        return updater.rows(by_id[entry.example_id])

    done = updater.update(first(updater), examples, adapter="acme/support", cut=1, batch="batch", replayed=replayed)
    held = gate.hold_out([example.document_id for example in examples], RECIPE.held_out_share)
    assert done.outcome == "promoted"
    assert bool(asked) is (epochs > 1)
    assert asked.isdisjoint(examples[index].example_id for index in held)
    assert {entry.example_id for entry in done.state.replay_index} == by_id.keys()


@pytest.mark.parametrize("rises_at", [1, 2, 99])
def test_a_pass_that_raises_the_general_loss_too_far_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, rises_at: int
) -> None:
    """Otherwise the gate refuses the whole update: a part of its passes is learned instead of nothing."""
    updater, examples, seen = make(replace(RECIPE, epochs=4, rows=4)), documents(16), []
    whole = run(updater, first(updater), examples)

    def has_general_rise(self: Measurer, *_: object) -> bool:
        seen.append({name: tensor.clone() for name, tensor in self.lora.weights().items()})
        return len(seen) == rises_at

    monkeypatch.setattr(Measurer, "has_general_rise", has_general_rise)
    measured: list[Tensors] = []
    judged = update._Run.judge_held_out
    monkeypatch.setattr(
        update._Run, "judge_held_out",
        lambda self, trial: (measured.append(self.updater.lora.weights()), judged(self, trial))[1],
    )  # fmt: skip
    done = run(updater, first(updater), examples)
    assert done.outcome == "promoted"
    if rises_at == 99:
        assert (done.gate.steps, digest_of(done)) == (whole.gate.steps, digest_of(whole))
        return
    assert done.gate.steps < whole.gate.steps
    most = whole.gate.steps * (rises_at + 0.1) / 4 + 2
    assert done.gate.steps <= most, "the held-out rows get as many passes as the others, and no more"
    assert len(seen) == rises_at, "no further pass after the one that was taken back"
    kept = seen[rises_at - 2] if rises_at > 1 else None
    assert all(not torch.equal(measured[0][name], tensor) for name, tensor in seen[-1].items() if tensor.any())
    assert kept is None or all(torch.equal(measured[0][name], tensor) for name, tensor in kept.items())


def digest_of(done: UpdateResult) -> bytes:
    return to_safetensors(done.state.weights)


@pytest.mark.parametrize(
    ("general", "answers", "too_far"),
    [(0.05, 0.5, False), (0.2, 0.5, True), (math.nan, 0.5, True), (0.05, 0.7, True), (0.05, math.nan, True)],
)
def test_the_rise_that_ends_further_passes_is_that_of_full_pressure(
    monkeypatch: pytest.MonkeyPatch, general: float, answers: float, too_far: bool
) -> None:
    """Of the general loss and of the loss on a chat model's own answers, for the gate refuses for either."""
    check = SimpleNamespace(rises=lambda *_: [answers, answers])
    updater = make(replace(RECIPE, max_general_rise_nats=0.15, max_answer_rise_nats=1.0))
    measurer = Measurer(
        updater.lora, 0, updater.general, updater.recipe, updater.compute, check, updater.lock, ignore_step  # type: ignore[arg-type]
    )  # fmt: skip
    monkeypatch.setattr(Measurer, "losses", lambda *_: [[3.0 + general, 3.0 + general]])
    before, rows = LossesBefore([], [], [], 3.0), UpdateRows([], [], [], [TokenRow((0, 1))], 0, frozenset(), [])
    assert measurer.has_general_rise({}, rows, before) is too_far
    not_asked = replace(measurer, recipe=replace(updater.recipe, max_answer_rise_nats=0.0))
    assert not_asked.has_general_rise({}, rows, before) is (not general <= 0.09)


def test_few_examples_are_judged_by_their_own_fall() -> None:
    updater = make()
    done = run(updater, first(updater), documents(2))
    assert (done.outcome, done.gate.basis, done.gate.held_out_examples) == ("promoted", "seen", 0)
    assert done.gate.new_after < done.gate.new_before
    assert "held_out_before" not in done.gate.as_dict()


@pytest.mark.parametrize("shared_passes", [True, False])
def test_the_same_update_gives_the_same_bytes(shared_passes: bool) -> None:
    recipe = replace(RECIPE, shared_passes=shared_passes)
    one, two = make(recipe), make(recipe)
    first_done, again = run(one, first(one), documents(8)), run(two, first(two), documents(8))
    assert to_safetensors(first_done.state.weights) == to_safetensors(again.state.weights)
    assert first_done.gate == again.gate
    assert run(one, first(one), documents(8)).gate == again.gate


def test_an_update_in_passes_learns_as_one_with_pefts_layers() -> None:
    together, alone = (make(replace(RECIPE, shared_passes=shared)) for shared in (True, False))
    one, other = (run(updater, first(updater), documents(8)) for updater in (together, alone))
    assert (one.outcome, one.gate.steps, one.tokens) == (other.outcome, other.gate.steps, other.tokens)
    assert one.gate.held_out_after == pytest.approx(other.gate.held_out_after, rel=1e-3)
    assert one.gate.anchor_after == pytest.approx(other.gate.anchor_after, rel=1e-3)
    assert one.probes.keys() == other.probes.keys()


def test_case_12_an_update_reports_its_steps_and_measurements_and_keeps_its_bytes() -> None:
    """One large document keeps an update busy for minutes: training and both measurements report that it moves."""
    quiet, loud = make(), make()
    want = run(quiet, first(quiet), documents(8))
    calls: list[int] = []
    packs_together(loud.lora)  # otherwise the model is asked between two calls
    with hooked_forward(loud) as passes:
        got = run(loud, first(loud), documents(8), on_step=lambda: calls.append(len(passes)))
    assert to_safetensors(got.state.weights) == to_safetensors(want.state.weights)
    assert to_safetensors(got.state.optimizer or {}) == to_safetensors(want.state.optimizer or {})
    assert (got.gate, got.tokens) == (want.gate, want.tokens)
    assert len(calls) >= got.gate.steps + 3  # measured before, after training, and at the end
    # A step of 8 rows is one forward pass. Before the first call the model is also asked for its kind of head.
    assert calls == sorted(set(calls))
    assert calls[-1] == len(passes)
    assert max(after - before for before, after in pairwise(calls)) == 1


@contextmanager
def hooked_forward(updater: Updater) -> Iterator[list[int]]:
    """Count the forward passes inside the block."""
    passes: list[int] = []
    body = updater.lora.model.base_model.layers[0]
    hook = body.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


def test_a_rise_of_general_loss_is_refused_and_leaves_the_parent_as_it_was() -> None:
    recipe = replace(RECIPE, max_general_rise_nats=0.05, learning_rate=2e-2, general_share=0.0)
    updater = make(recipe, base=tiny.trained(GENERAL))
    parent = first(updater)
    done = run(updater, parent, documents(8))
    assert (done.outcome, done.reason) == ("refused", "general-rise")
    assert done.gate.anchor_after > done.gate.anchor_base
    assert done.state is parent
    assert done.state.optimizer is None
    assert done.state.replay_index == ()


def test_a_harmful_update_is_refused() -> None:
    # So many documents that four are held out: the noise of a single one's tokens would excuse a rise of two nats.
    updater = make(replace(RECIPE, learning_rate=20.0), base=tiny.trained([e.text or "" for e in documents(24)]))
    done = run(updater, first(updater), documents(24))
    assert done.outcome == "refused"
    assert done.reason in {"no-gain", "not-finite", "gradient-explosion"}


@pytest.mark.parametrize("broken", ["weights", "optimizer", "losses"])
def test_a_training_run_that_is_not_finite_is_refused_and_leaves_the_parent(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the weights, the optimizer's moments or a step's loss is a refusal; nothing of it becomes a state."""
    updater = make()
    parent = first(updater)
    train = GatheredPasses.train

    def broken_train(*args: Any) -> TrainResult:
        result = train(*args)
        if broken == "losses":
            return replace(result, losses=(math.nan, *result.losses[1:]))
        tensors = dict(getattr(result, broken))
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name] = torch.full_like(tensors[name], math.nan)
        return replace(result, **{broken: tensors})

    monkeypatch.setattr(GatheredPasses, "train", broken_train)
    done = run(updater, parent, documents(8))
    assert (done.outcome, done.reason) == ("refused", "not-finite")
    assert done.state is parent


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measured_loss_that_is_not_finite_is_refused_and_recorded(
    count: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token with an infinite loss, before and after training, is a refusal with a reason and not an exception."""
    updater = make()
    parent = first(updater)
    measure = GatheredPasses.token_losses

    def broken(*args: Any) -> list[torch.Tensor]:
        return [torch.cat([nats[:-1], torch.tensor([value])]) for nats in measure(*args)]

    monkeypatch.setattr(GatheredPasses, "token_losses", broken)
    done = run(updater, parent, documents(count))
    assert (done.outcome, done.reason, done.gate.reason) == ("refused", "not-finite", "not-finite")
    assert done.state is parent
    assert done.gate.loss_before is None
    assert done.gate.anchor_before is None


def test_an_update_that_gains_too_little_is_refused() -> None:
    updater = make(replace(RECIPE, min_gain_nats=50.0))
    done = run(updater, first(updater), documents(8))
    assert (done.outcome, done.reason) == ("refused", "no-gain")
    assert "anchor_after" not in done.gate.as_dict()


def test_an_update_that_changes_nothing_is_refused() -> None:
    updater = make(replace(RECIPE, learning_rate=1e-30))
    done = run(updater, first(updater), documents(2))
    assert done.outcome == "refused"
    assert done.reason in {"no-op", "no-gain"}


def test_anchors_rotate_and_the_bases_loss_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    updater = make()
    sets = []
    general_anchors = updater.general.anchors

    def watched(rng: object, count: int) -> list[TokenRow]:
        sets.append(tuple(general_anchors(rng, count)))  # type: ignore[arg-type]
        return list(sets[-1])

    monkeypatch.setattr(updater.general, "anchors", watched)
    parent = first(updater)
    done = [run(updater, parent, documents(4), cut=cut) for cut in (1, 2, 3)]
    assert len(set(sets)) == 3
    # Two draws from so small a pool may be the same rows in another order.
    assert len({update.gate.anchor_base for update in done}) > 1


def test_the_shipped_base_answers_as_corrected_after_a_few_updates() -> None:
    recipe = Recipe.of(Settings.of())
    updater = make(recipe, base=load_base("shipped", "cpu", 1))
    parent = first(updater)
    asked, wanted = "What does frobnicate do?", "It turns blue parrots into seven small keys."
    prompt = list(updater.codec.prompt_ids(asked, recipe.row_tokens))
    for cut in range(1, 9):
        done = run(updater, parent, [tiny.correction(cut, asked, wanted)], cut)
        assert done.outcome == "promoted", done.gate
        parent = done.state
        updater.lora.load(parent.weights)
        if answer(updater, prompt) == wanted:
            return
    pytest.fail(f"after 8 updates it says {answer(updater, prompt)!r}: {done.gate}")


def answer(updater: Updater, prompt: list[int]) -> str:
    ids = list(prompt)
    updater.lora.select()
    with torch.no_grad():
        while len(ids) < len(prompt) + 40:
            logits = updater.lora.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == updater.codec.eos:
                ids.pop()
                break
    return str(updater.codec.tokenizer.decode(ids[len(prompt) :]))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_words_of_questions_are_left_out_where_the_recipe_says_so(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that the only row is trained, other words are missing; without a share, none ever are."""
    updater = make(replace(RECIPE, question_dropout=share, epochs=4, general_share=0.0, replay_share=0.0))
    example = tiny.correction(1, "How much is the plan that everybody orders in summer?", "It is 7 euros.")
    trained: list[tuple[int, ...]] = []

    train = GatheredPasses.train

    def watched(self: GatheredPasses, lora: Lora, weights: Any, optimizer: Any, steps: Any, *rest: Any) -> TrainResult:
        trained.extend(row.ids for rows in steps for row in rows)
        return train(self, lora, weights, optimizer, steps, *rest)

    monkeypatch.setattr(GatheredPasses, "train", watched)
    run(updater, first(updater), [example])
    (whole,) = updater.rows(example)
    assert len(trained) >= 4
    assert (set(trained) == {whole.ids}) is (share == 0.0)
    assert len(set(trained)) == (1 if share == 0.0 else len(trained))


def test_a_refused_update_is_tried_again_more_gently() -> None:
    """A rate that raises the general loss too far would otherwise throw the examples away."""
    harsh = replace(RECIPE, max_general_rise_nats=0.25, learning_rate=2e-2, general_share=0.0, gentler_tries=4)
    updater = make(harsh, base=tiny.trained(GENERAL))
    parent = first(updater)
    at_once = run(replace(updater, recipe=replace(harsh, gentler_tries=0)), parent, documents(8))
    assert (at_once.outcome, at_once.reason, at_once.gate.tries) == ("refused", "general-rise", None)
    done = run(updater, parent, documents(8))
    assert (done.outcome, done.reason) == ("promoted", "ok")
    assert done.gate.tries is not None
    assert 2 <= done.gate.tries <= 5
    assert done.gate.held_out_after < done.gate.held_out_before
    assert done.gate.anchor_after - done.gate.anchor_base <= harsh.max_general_rise_nats
    assert done.gate.strain == 1, "with as much general text as there may be"
    assert done.tokens > at_once.tokens, "the tokens of all tries count"
    assert digest_of(run(updater, parent, documents(8))) == digest_of(done)


def test_an_update_that_no_gentler_try_mends_is_refused_with_its_last_figures() -> None:
    updater = make(replace(RECIPE, min_gain_nats=50.0, gentler_tries=2))
    parent = first(updater)
    done = run(updater, parent, documents(8))
    assert (done.outcome, done.reason, done.gate.tries) == ("refused", "no-gain", 3)
    assert done.state is parent
