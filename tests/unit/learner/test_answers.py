"""Trial answers: an adapter that overflows, repeats itself, ends at once or forgets what the base knew is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_text import GeneralText
from perennial.learner.model.generation import Decoded
from perennial.learner.model.lora import Lora, LoraConfig, Tensors, to_safetensors
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, turn_rows
from perennial.learner.together.gathered_passes import GatheredPasses
from perennial.learner.training import gate
from perennial.learner.training.answers import QUESTIONS, TRIAL_QUESTIONS, AnswerCheck, TrialAnswers, is_degenerate
from perennial.learner.training.recipe import Recipe
from perennial.learner.training.replay_buffer import ReplayEntry
from perennial.learner.training.state import TrainingState
from perennial.learner.training.trainer import TrainConfig, train
from perennial.learner.training.update import Updater, UpdateResult
from perennial.streams.events.models import ExampleAccepted
from perennial.streams.settings import Settings
from perennial.streams.settings.presets import presets
from tests import tiny

KNOWN = {"sky?": "blue", "grass?": "green", "snow?": "white", "coal?": "black", "sun?": "yellow", "sea?": "deep blue"}
LIMITS = gate.GateLimits(0.0, 10.0, 0.5)
RECIPE = replace(
    Recipe.of(Settings.of()), rank=8, alpha=16, learning_rate=1e-2, warmup_steps=2, steps=12, rows=6, row_tokens=48,
    anchor_rows=0, general_share=0.0, replay_share=0.0, held_out_share=0.0, max_general_rise_nats=10.0,
    max_answer_rise_nats=0.5, min_gain_nats=-1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def lora() -> Lora:
    """A slot over a base that knows six answers."""
    make_deterministic(1)
    base = tiny.trained([f"<|user|>{question}<|assistant|>{answer}" for question, answer in KNOWN.items()], 150)
    return Lora(base, LoraConfig(8, 16))


@pytest.fixture(scope="module")
def check(lora: Lora) -> AnswerCheck:
    return AnswerCheck(ExampleTokenizer(lora.base.tokenizer), tuple(KNOWN))


def taught(lora: Lora, answers: dict[str, str], steps: int = 60) -> Tensors:
    """Return the weights of an adapter that gives these answers; an empty one ends at once."""
    codec = ExampleTokenizer(lora.base.tokenizer)
    rows: list[TokenRow] = []
    for question, answer in answers.items():
        prompt = codec.prompt_ids(question, 96)
        rows += (
            turn_rows([("user", question)], answer, codec, 96)
            if answer
            else [TokenRow((*prompt, codec.eos), len(prompt))]
        )
    start = lora.initial_weights("a", 0)
    return train(lora, start, None, [rows] * steps, TrainConfig(1e-2, 1.0, codec.pad, 2)).weights


def judged(lora: Lora, check: AnswerCheck, weights: Tensors) -> gate.GateReason:
    lora.load(weights)
    trial = check.trial(lora)
    verdict = gate.judge_trial(trial.asked, trial.degenerate, finite=trial.finite)
    if verdict.promote:
        verdict = gate.judge_answers(gate.mean(check.rises(lora)), lambda: 0.0, LIMITS)
    return verdict.reason


def test_an_adapter_that_does_nothing_answers_as_the_base(lora: Lora, check: AnswerCheck) -> None:
    lora.load(lora.initial_weights("a", 0))
    assert check.trial(lora) == TrialAnswers(len(KNOWN), 0, finite=True)
    assert check.rises(lora) == pytest.approx([0.0] * len(KNOWN), abs=1e-5)
    assert judged(lora, check, lora.initial_weights("a", 0)) == "ok"


def test_answers_are_measured_in_the_passes_that_updates_share(lora: Lora, check: AnswerCheck) -> None:
    """One row at a time in the slot, or as packed rows: the same rise, but for the last bits."""
    weights = taught(lora, {**KNOWN, "price of a parrot?": "9 euros"}, 10)
    lora.load(weights)
    in_slot = check.rises(lora)
    lora.load(lora.initial_weights("a", 0))  # the passes do not read the slot
    passes = GatheredPasses()
    shared = check.rises(
        lora, measure=lambda rows: passes.token_losses(lora, weights, rows, check.codec.pad, None, ignore_step)
    )
    assert shared == pytest.approx(in_slot, abs=1e-4)
    assert shared != pytest.approx([0.0] * len(KNOWN), abs=1e-3)


def test_an_adapter_that_learns_something_else_passes(lora: Lora, check: AnswerCheck) -> None:
    more = taught(lora, {**KNOWN, "price of a parrot?": "9 euros"}, 40)
    assert judged(lora, check, more) == "ok"


def test_a_finite_adapter_that_overflows_in_the_answer_is_refused(lora: Lora, check: AnswerCheck) -> None:
    weights = {name: torch.full(shape, 1e20) for name, shape in lora.shapes.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert judged(lora, check, weights) == "not-finite"


def test_an_adapter_that_repeats_itself_is_refused(lora: Lora, check: AnswerCheck) -> None:
    assert judged(lora, check, taught(lora, dict.fromkeys(KNOWN, "ha" * 16))) == "degenerate"


def test_an_adapter_that_ends_at_once_is_refused(lora: Lora, check: AnswerCheck) -> None:
    assert judged(lora, check, taught(lora, dict.fromkeys(KNOWN, ""))) == "degenerate"


def test_an_adapter_that_answers_everything_with_what_it_learned_is_refused(lora: Lora, check: AnswerCheck) -> None:
    assert judged(lora, check, taught(lora, dict.fromkeys(KNOWN, "it is called Tarnis"))) == "collapse"


@pytest.mark.parametrize(
    ("ids", "degenerate"),
    [((), True), ((5,), False), (tuple(range(20)), False), ((1, *[7] * 12), True), ((*[7] * 12, 1), False),
     ((1, 2, 3) * 6, True), ((1, 2, 3) * 3, False), ((1, 2, 3, 4, 5, 6) * 3, True), ((9,) * 8, False)],
)  # fmt: skip
def test_a_loop_at_the_end_is_degenerate(ids: tuple[int, ...], degenerate: bool) -> None:
    assert is_degenerate(Decoded(ids, ended=False)) is degenerate
    assert is_degenerate(Decoded(ids, ended=False, finite=False))


def test_what_the_base_itself_cannot_answer_is_not_asked(lora: Lora) -> None:
    """A random base runs into loops, and must not have every update refused for it."""
    base = tiny.base()
    bare = Lora(base, LoraConfig(8, 16))
    bare.load(bare.initial_weights("a", 0))
    found = AnswerCheck(ExampleTokenizer(base.tokenizer)).trial(bare)
    assert found.degenerate == 0
    assert found.asked <= TRIAL_QUESTIONS < len(QUESTIONS)
    assert gate.judge_trial(0, 0, finite=True).promote


def test_more_than_a_third_must_be_degenerate() -> None:
    assert gate.judge_trial(6, 2, finite=True).promote
    assert gate.judge_trial(6, 3, finite=True).reason == "degenerate"
    assert gate.judge_trial(1, 1, finite=True).reason == "degenerate"


def test_a_version_on_its_way_back_passes() -> None:
    assert gate.judge_answers(0.9, lambda: 1.0, LIMITS).promote
    assert gate.judge_answers(0.9, lambda: 0.8, LIMITS).reason == "collapse"
    assert gate.judge_answers(0.9, lambda: float("nan"), LIMITS).reason == "collapse"
    assert gate.judge_answers(float("nan"), lambda: 0.8, LIMITS).reason == "not-finite"


def run(lora: Lora, check: AnswerCheck | None, recipe: Recipe, answers: Sequence[str]) -> UpdateResult:
    codec = ExampleTokenizer(lora.base.tokenizer)
    updater = Updater(lora, codec, GeneralText([], [], codec, 48), recipe, answers=check, shared=GatheredPasses())
    examples = [
        ExampleAccepted(
            adapter="acme/support", example_id=f"{n:032x}", kind="correction", learn=True, prompt=question, answer=answer,
            document_id=f"doc-{n}", origin=tiny.origin(n),
        )
        for n, (question, answer) in enumerate(zip(KNOWN, answers, strict=False))
    ]  # fmt: skip

    def replayed(_: ReplayEntry) -> list[TokenRow]:
        return []

    parent = TrainingState(lora.initial_weights("acme/support", 0))
    done = updater.update(parent, examples, adapter="acme/support", cut=1, batch="b", replayed=replayed)
    assert (done.state is parent) == (done.outcome == "refused")
    return done


def test_an_update_is_refused_for_its_answers_and_the_figures_say_so(lora: Lora, check: AnswerCheck) -> None:
    lost = run(lora, check, replace(RECIPE, steps=60), ["it is called Tarnis"] * 6)
    assert (lost.outcome, lost.reason, lost.gate.degenerate_answers) == ("refused", "collapse", 0)
    assert lost.gate.answer_rise is not None
    assert lost.gate.answer_rise > RECIPE.max_answer_rise_nats
    kept = run(lora, check, RECIPE, list(KNOWN.values()))
    assert (kept.outcome, kept.gate.degenerate_answers) == ("promoted", 0)
    assert kept.gate.answer_rise is not None
    assert kept.gate.answer_rise < 0.1


def test_an_update_that_was_recorded_before_the_check_is_made_again_without_it(lora: Lora, check: AnswerCheck) -> None:
    """A rebuild must not refuse what was promoted: the update's own recipe decides whether answers are looked at."""
    config = {name: value for name, value in RECIPE.config().items() if name != "max_answer_rise_nats"}
    recipe = Recipe.recorded({**config, "steps": 60})
    assert recipe.max_answer_rise_nats == 0
    again = run(lora, check, recipe, ["it is called Tarnis"] * 6)
    unchecked = run(lora, None, replace(recipe, max_answer_rise_nats=0.5), ["it is called Tarnis"] * 6)
    assert again.outcome == unchecked.outcome == "promoted"
    assert again.gate.answer_rise is None
    assert to_safetensors(again.state.weights) == to_safetensors(unchecked.state.weights)


def test_the_check_changes_no_bit_of_what_passes(lora: Lora, check: AnswerCheck) -> None:
    with_check = run(lora, check, RECIPE, list(KNOWN.values()))
    without = run(lora, None, RECIPE, list(KNOWN.values()))
    assert with_check.outcome == "promoted"
    assert to_safetensors(with_check.state.weights) == to_safetensors(without.state.weights)
    assert with_check.probes == without.probes


def test_answers_are_looked_at_by_default_except_of_the_smallest_bases() -> None:
    """The shipped base knows no facts; its versions keep their bytes."""
    assert Settings.of(env_file=None, base="shipped").gate.max_answer_rise_nats == 0
    assert all(preset.values["max_answer_rise_nats"] > 0 for preset in presets()[1:])
