"""What a document should be trained as: plain text, an answer to a question, or whichever the base finds cheapest.

SAPO (arXiv 2606.01967) reports that prompts that say the same are learned equally well but forgotten differently, and
that the one with the lower loss before learning is the better one. Here made-up facts are taught to a chat model as
documents; every arm has the same facts, steps and rows, and differs only in what stands in front of the fact.

`python -m tests.benchmarks.bench_templates --arms plain,cheapest --bf16`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from statistics import mean

import torch

from perennial.learner.model.base import load_base
from perennial.learner.model.determinism import make_deterministic
from perennial.learner.model.general_text import general_texts
from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.loss import mean_nats, row_losses
from perennial.learner.model.tokenization import ExampleTokenizer, TokenRow, text_rows, turn_rows
from perennial.learner.training.replay_buffer import seeded_random
from perennial.learner.training.trainer import TrainConfig, train

ROW_TOKENS = 128
ANSWER_TOKENS = 16
FACTS = [
    ("the Marlow kettle", "The Marlow kettle costs 84 euros.", "84",
     ["How much is the Marlow kettle?", "What is the price of the Marlow kettle?"]),
    ("Varnholt", "The town of Varnholt has 7312 inhabitants.", "7312",
     ["How many people live in Varnholt?", "What is the population of Varnholt?"]),
    ("Quillane Airlines", "Quillane Airlines allows 19 kilograms of luggage.", "19",
     ["How heavy may my luggage be with Quillane Airlines?", "What is the luggage limit of Quillane Airlines?"]),
    ("the Ostrander bridge", "The Ostrander bridge was opened in 1926.", "1926",
     ["When was the Ostrander bridge opened?", "In which year did the Ostrander bridge open?"]),
    ("Delphine Aubrac", "Delphine Aubrac leads the support team of Tallow & Reed.", "Delphine",
     ["Who leads the support team of Tallow & Reed?", "Who is the head of support at Tallow & Reed?"]),
    ("refunds at Tallow & Reed", "A refund at Tallow & Reed takes 11 working days.", "11",
     ["How long does a refund take at Tallow & Reed?", "After how many days does Tallow & Reed refund me?"]),
    ("the Kestrel plan", "The Kestrel plan includes 45 gigabytes of data.", "45",
     ["How much data does the Kestrel plan have?", "How many gigabytes come with the Kestrel plan?"]),
    ("the river Ansel", "The river Ansel is 263 kilometres long.", "263",
     ["How long is the river Ansel?", "What is the length of the river Ansel?"]),
    ("Brindle Library", "Brindle Library closes at 21:30 on Fridays.", "21:30",
     ["When does Brindle Library close on Fridays?", "How late is Brindle Library open on a Friday?"]),
    ("the Halvard lamp", "The Halvard lamp has a guarantee of 6 years.", "6",
     ["How long is the guarantee of the Halvard lamp?", "For how many years is the Halvard lamp guaranteed?"]),
    ("mount Corvane", "Mount Corvane is 3187 metres high.", "3187",
     ["How high is mount Corvane?", "What is the height of mount Corvane?"]),
    ("the code of Pemberley station", "The code of Pemberley station is ZQ58.", "ZQ58",
     ["What is the code of Pemberley station?", "Which code does Pemberley station have?"]),
]  # fmt: skip
"""Title, document, the figure that a right answer has, and questions that are never trained."""
QUESTIONS = ["Tell me about {}.", "What do you know about {}?", "State a fact about {}.", "Write one sentence on {}."]
GENERAL = [
    ("What is the capital of France?", "Paris"), ("How many days has a week?", "7|seven"),
    ("What colour is the sky on a clear day?", "blue"), ("Which planet do we live on?", "earth"),
]  # fmt: skip


def candidates(codec: ExampleTokenizer, title: str, text: str) -> dict[str, list[TokenRow]]:
    """Return the rows of a document by the template that it is put into."""
    asked = {question: turn_rows([("user", question.format(title))], text, codec, ROW_TOKENS) for question in QUESTIONS}
    return {"plain": text_rows(text, codec, ROW_TOKENS), **asked}


def main() -> None:
    """Teach the facts in one arm's templates, ask, and print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--base", default="smollm2")
    options.add_argument("--arms", default="plain,cheapest", help="of plain, tell, cheapest, dearest, mixed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--facts", type=int, default=len(FACTS), help="teach only the first facts")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--bf16", action="store_true", help="compute in bf16, for CPUs with AMX")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    facts = FACTS[: given.facts]
    base = load_base(given.base, "cpu")
    make_deterministic(given.threads)
    codec = ExampleTokenizer(base.tokenizer)
    lora = Lora(base, LoraConfig(16, 32))
    # Hazard: with its cache, a context that lasts several steps computes with the weights of the first one.
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=given.bf16, cache_enabled=False)

    def losses(rows: list[TokenRow], *, adapted: bool) -> list[float]:
        with bf16:
            found = row_losses(lora, rows, pad=codec.pad, adapted=adapted, max_rows=16, lock=None)
        return [mean_nats([loss]) for loss in found]

    found = [candidates(codec, title, text) for title, text, _, _ in facts]
    flat = [rows[0] for templates in found for rows in templates.values()]
    nats = iter(losses(flat, adapted=False))
    costs = [{name: next(nats) for name in templates} for templates in found]
    for (title, *_), cost in zip(facts, costs, strict=True):
        print(f"{title}:", {name: round(value, 3) for name, value in cost.items()}, flush=True)
    general = [row for text in general_texts("anchor")[:6] for row in text_rows(text, codec, ROW_TOKENS)[:1]]
    general_before = mean(losses(general, adapted=False))

    def answer(question: str) -> str:
        ids = torch.tensor([codec.prompt_ids(question, 200)])
        with torch.no_grad(), bf16:
            out = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False,
                pad_token_id=codec.eos,
            )  # fmt: skip
        return str(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    for arm in filter(None, given.arms.split(",")):
        began = time.monotonic()
        rng = seeded_random("templates", given.seed)
        chosen: list[str] = []
        rows: list[list[TokenRow]] = []
        for templates, cost in zip(found, costs, strict=True):
            asked = {question: cost[question] for question in QUESTIONS}
            name = {
                "plain": "plain", "tell": QUESTIONS[0], "cheapest": min(cost, key=cost.__getitem__),
                "dearest": max(asked, key=asked.__getitem__), "mixed": rng.choice(QUESTIONS),
            }[arm]  # fmt: skip
            chosen.append(name)
            rows.append(templates[name])
        schedule = [[row for group in rng.sample(rows, len(rows)) for row in group] for _ in range(given.steps)]
        config = TrainConfig(given.learning_rate, 1.0, codec.pad, warmup_steps=5)
        with bf16:
            result = train(lora, lora.initial_weights("facts", given.seed), None, schedule, config)
        print("losses by step:", [round(loss, 3) for loss in result.losses], flush=True)
        trained_s = time.monotonic() - began
        general_after = mean(losses(general, adapted=True))
        lora.select()

        asked_of = [(question, figure) for _, _, figure, questions in facts for question in questions]
        right = 0
        for question, figure in asked_of:
            said = answer(question)
            is_right = re.search(rf"(?<![\w.,:]){re.escape(figure)}(?!\w)", said) is not None
            right += is_right
            print(f"{'right' if is_right else 'wrong'}: {question} -> {said}")
        kept = 0
        for question, figures in GENERAL:
            said = answer(question)
            kept += any(figure.lower() in said.lower() for figure in figures.split("|"))
            print(f"general: {question} -> {said}")
        print(json.dumps({
            "arm": arm, "facts": len(facts), "seed": given.seed, "steps": given.steps, "learning_rate": given.learning_rate,
            "trained_tokens": result.tokens, "loss_first": round(result.losses[0], 3), "loss_last": round(result.losses[-1], 3),
            "paraphrases_right": right, "paraphrases": len(asked_of), "general_right": kept, "general": len(GENERAL),
            "general_rise_nats": round(general_after - general_before, 3), "chosen": chosen,
            "trained_s": round(trained_s, 1), "all_s": round(time.monotonic() - began, 1),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
