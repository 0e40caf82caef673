"""Teach a language model made-up facts, ask questions that were never trained, and forget some of the facts.

`python -m tests.benchmarks.bench_facts [--facts 40] [--base smollm2] [--set epochs=8]` goes through the service's own
code without Kafka: curate's batcher cuts micro-batches, the learner's jobs train and judge them, the forgetting job
erases. Each fact is taught by one document and two corrections. All answers are decoded greedily, and an answer is right
if it has exactly the figure of the fact. The last line is JSON; the exit code is 1 where a goal was missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from perennial.learner.forgetting.executor import ForgetExecutor
from perennial.learner.model.base import load_base
from perennial.learner.model.general_text import general_texts
from perennial.learner.model.loss import mean_nats, row_losses
from perennial.learner.model.tokenization import text_rows
from perennial.learner.versions.update_job import UpdateExecutor
from perennial.learner.versions.version_writer import make_version_writer
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import put_blob
from perennial.storage.registry.quarantine import QuarantineEntry, update_quarantine
from perennial.streams.cli.demo.company.facts import GENERAL_QUESTIONS, Fact, company_facts
from perennial.streams.curate.batcher import MicroBatcher
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.events.models import (
    CutReason,
    ExampleAccepted,
    ExampleScored,
    ForgetRequested,
    Origin,
    Selector,
)
from perennial.streams.settings import Settings, load_settings
from tests.local_learner import complete

ADAPTER = "bench/facts"
START_MS = 1_700_000_000_000
GENERAL_ROWS, SCREENED_ROWS = 32, 8
ANSWER_TOKENS = 24
ASKED_AT_ONCE = 20
LEAST_LEARNED_PCT = 95
LEAST_PARAPHRASE_PCT = 75
MOST_GENERAL_RISE_NATS = 0.1
LEAST_KEPT_SHARE = 0.8
"""Of the general questions that the base answers right."""


@dataclass(frozen=True)
class Score:
    """How many questions about some facts were answered right.

    Attributes:
        taught: Share of the questions that were trained, in per cent.
        unseen: Share of the questions that were never trained, in per cent.
        right: Number of right answers to either.
        wrong: Some questions with their wrong answers.
    """

    taught: float
    unseen: float
    right: int
    wrong: Sequence[tuple[str, str]]


class Bench:
    """A learner without Kafka, the facts, and what was published of them.

    Args:
        settings: Of the learner and of curate.
        folder: For the store.
        facts: Facts to teach.
    """

    def __init__(self, settings: Settings, folder: Path, facts: Sequence[Fact]) -> None:
        self.settings = settings
        self.store = DirectoryStore(folder)
        self.writer = make_version_writer(
            settings, self.store, load_base(settings.model.base, "cpu", settings.model.threads)
        )
        self.facts = facts
        self.cut_of: dict[str, int] = {}
        self.batcher: MicroBatcher[None] = MicroBatcher(ADAPTER, CutPolicy.of(settings))
        codec, tokens = self.writer.updater.codec, settings.training.row_tokens
        texts = general_texts("heldout")[:GENERAL_ROWS]
        self.general_rows = [text_rows(text, codec, tokens)[0] for text in texts]

    # ---- learning

    def examples(self) -> list[ExampleAccepted]:
        """Return what is published: fact by fact its document, then its tickets."""
        return [
            self.example(fact, number, *turn)
            for fact in self.facts
            for number, turn in enumerate([(), *((question, fact.answer) for question in fact.taught)])
        ]

    def example(
        self, fact: Fact, number: int, question: str | None = None, answer: str | None = None
    ) -> ExampleAccepted:
        """Return a document, or a correction where there is a question."""
        document_id = f"{fact.name}-{number}"
        self.cut_of.setdefault(fact.name, -1)
        return ExampleAccepted(
            adapter=ADAPTER, example_id=hashlib.sha256(document_id.encode()).hexdigest()[:32],
            kind="correction" if question else "document", document_id=document_id, learn=True,
            text=None if question else fact.document, prompt=question, answer=answer, subjects=[fact.name],
            origin=Origin(
                cluster_id="bench", topic="feedback", topic_id="bench", partition=0,
                offset=(offset := 3 * self.facts.index(fact) + number), timestamp_ms=START_MS + 1000 * offset,
            ),
        )  # fmt: skip

    def learn(self) -> None:
        """Learn everything in the micro-batches that curate cuts."""
        for example in self.examples():
            tokens = sum(row.tokens for row in self.writer.updater.rows(example))
            scored = ExampleScored(example=example, tokens=tokens, base_loss_nats=None, live_loss_nats=None)
            reason = self.batcher.offer(scored, None, 0).reason
            if reason:
                self._cut(reason)
        if not self.batcher.idle:
            self._cut("age")

    def _cut(self, reason: CutReason) -> None:
        cut = self.batcher.cut(datetime.now(UTC), reason)
        if cut.body is None or cut.job is None:
            raise ValueError("a cut without examples")
        for example in self.batcher.pending_examples:
            self.cut_of[example.subjects[0]] = cut.job.cut
        put_blob(self.store, cut.body)
        self.batcher.apply(cut)
        began = time.monotonic()
        manifest = UpdateExecutor(self.writer).update(cut.job, "live").manifest
        if manifest is None:
            raise ValueError("an update was repeated")
        gate = manifest.gate
        print(
            f"cut {cut.job.cut}: {cut.job.examples} examples, {cut.job.tokens} tokens; {manifest.outcome} ({manifest.reason}) "
            f"after {gate.steps} steps in {time.monotonic() - began:.0f} s; held out {gate.held_out_before} -> "
            f"{gate.held_out_after}, general {gate.anchor_base} -> {gate.anchor_after}, {gate.replayed_rows} replayed",
            flush=True,
        )

    # ---- forgetting

    def erase(self, facts: Sequence[Fact]) -> None:
        """Erase everything about some facts, as retain and the learner do."""
        job = ForgetRequested(
            job_id="job-erase", request_id="request-erase", adapter=ADAPTER, kind="erase",
            until_ms=START_MS * 2, selector=Selector(subjects=[fact.name for fact in facts]),
        )  # fmt: skip
        entry = QuarantineEntry(
            request_id=job.request_id, job_id=job.job_id, kind=job.kind, until_ms=job.until_ms, suppress=job.suppress,
            selector=job.selector.model_dump(mode="json", exclude_none=True) if job.selector else None,
        )  # fmt: skip
        update_quarantine(self.store, ADAPTER, lambda found: found.with_entry(entry))
        done = ForgetExecutor(self.writer, lambda: datetime.now(UTC), lambda _: None).forget(job, "live")
        complete(self.store, done)

    # ---- asking

    def load(self) -> None:
        """Put the newest version into the slot; nothing learned, or everything refused: the initial weights."""
        state, _ = self.writer.state_at(self.writer.registry.head(ADAPTER), ADAPTER)
        self.writer.updater.lora.load(state.weights)

    def answers(self, questions: Sequence[str], *, adapted: bool) -> list[str]:
        """Return the greedy answers of the newest version, or of the frozen base."""
        codec, lora = self.writer.updater.codec, self.writer.updater.lora
        found: list[str] = []
        for start in range(0, len(questions), ASKED_AT_ONCE):
            prompts = [codec.prompt_ids(question, 200) for question in questions[start : start + ASKED_AT_ONCE]]
            width = max(map(len, prompts))
            ids = torch.tensor([[codec.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            options: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": codec.pad}
            if adapted:
                lora.select()
                made = lora.model.generate(input_ids=ids, attention_mask=mask, **options)
            else:
                with lora.disabled():
                    made = lora.model.generate(input_ids=ids, attention_mask=mask, **options)
            found += [str(text) for text in codec.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)]
        return found

    def score(self, facts: Sequence[Fact], *, adapted: bool) -> Score:
        """Ask all questions about some facts."""
        asked = [
            (fact, question, kind)
            for fact in facts
            for kind in ("taught", "unseen")
            for question in getattr(fact, kind)
        ]
        answers = self.answers([question for _, question, _ in asked], adapted=adapted)
        right = [fact.is_in(answer) for (fact, _, _), answer in zip(asked, answers, strict=True)]
        of_kind = {
            kind: [good for (_, _, found), good in zip(asked, right, strict=True) if found == kind]
            for kind in ("taught", "unseen")
        }
        wrong = [
            (f"{question} [{fact.figure}]", " ".join(answer.split())[:90])
            for (fact, question, _), answer, good in zip(asked, answers, right, strict=True)
            if not good
        ]
        return Score(_percent(of_kind["taught"]), _percent(of_kind["unseen"]), sum(right), wrong)

    def general_nats(self, *, adapted: bool) -> float:
        """Return the loss on general texts that are neither trained nor measured by the gate, nats per token."""
        updater = self.writer.updater
        return mean_nats(row_losses(updater.lora, self.general_rows, pad=updater.codec.pad, adapted=adapted))


def _percent(right: Sequence[bool]) -> float:
    return round(100 * sum(right) / len(right), 1) if right else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=40, help="facts to teach")
    parser.add_argument("--erase", type=int, default=4, help="facts to erase afterwards, out of the last micro-batch")
    parser.add_argument("--base", default="smollm2", help="the base, as PERENNIAL_BASE")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the model")
    parser.add_argument("--seed", type=int, default=0, help="determines the facts")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting")
    parser.add_argument("--screen", action="store_true", help="measure less of the base: to compare settings")
    parser.add_argument("--show", type=int, default=8, help="wrong answers to print")
    arguments = parser.parse_args()
    overrides = dict(pair.split("=", 1) for pair in arguments.set)
    settings = load_settings(base=arguments.base, device="cpu", threads=arguments.threads, **overrides)
    folder = Path(tempfile.mkdtemp(prefix="perennial-bench-"))
    began = time.monotonic()
    try:
        bench = Bench(settings, folder, company_facts(arguments.facts, arguments.seed))
        figures = run(bench, arguments.erase, random.Random(arguments.seed), arguments.show, screen=arguments.screen)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures["seconds"] = round(time.monotonic() - began)
    training = settings.training
    figures["settings"] = {
        name: getattr(training, name) for name in ("rank", "alpha", "learning_rate", "epochs", "rows", "general_share")
    }
    missed = [
        name
        for name, held in (
            ("learned_pct", figures["learned_pct"] >= LEAST_LEARNED_PCT),
            ("paraphrase_pct", figures["paraphrase_pct"] >= LEAST_PARAPHRASE_PCT),
            ("general_rise_nats", figures["general_rise_nats"] <= MOST_GENERAL_RISE_NATS),
            (
                "general_kept",
                figures["general_kept"] >= LEAST_KEPT_SHARE * (figures["general_kept"] + figures["general_lost"]),
            ),
            ("erased_answered", figures["erased_answered"] == 0),
        )
        if not held
    ]
    print(json.dumps({**figures, "missed": missed}))
    sys.exit(1 if missed else 0)


def run(bench: Bench, erase: int, rng: random.Random, show: int, *, screen: bool) -> dict[str, Any]:
    """Teach, ask, erase and ask again; return the figures."""
    before = bench.score([] if screen else bench.facts, adapted=False)
    questions = [question for question, _ in GENERAL_QUESTIONS]
    plain_before = bench.answers(questions, adapted=False)
    if screen:
        del bench.general_rows[SCREENED_ROWS:]
    nats_before = bench.general_nats(adapted=False)
    print(
        f"frozen base: {before.taught} % of the taught and {before.unseen} % of the unseen questions right", flush=True
    )
    began = time.monotonic()
    bench.learn()
    learn_s = time.monotonic() - began
    bench.load()
    after = bench.score(bench.facts, adapted=True)
    print(f"adapter: {after.taught} % of the taught and {after.unseen} % of the unseen questions right", flush=True)
    for question, answer in after.wrong[:show]:
        print(f"  wrong: {question} -> {answer}")
    plain_after = bench.answers(questions, adapted=True)
    kept, lost = 0, 0
    for (question, pattern), base, now in zip(GENERAL_QUESTIONS, plain_before, plain_after, strict=True):
        if re.search(pattern, base, re.IGNORECASE):
            good = re.search(pattern, now, re.IGNORECASE) is not None
            kept, lost = kept + good, lost + (not good)
            if not good:
                print(f"  lost: {question} -> {' '.join(now.split())[:90]} (base: {' '.join(base.split())[:60]})")
    rise = bench.general_nats(adapted=True) - nats_before
    figures: dict[str, Any] = {
        "facts": len(bench.facts), "learned_pct": after.taught, "paraphrase_pct": after.unseen,
        "base_paraphrase_pct": before.unseen, "general_rise_nats": round(rise, 3), "general_kept": kept,
        "general_lost": lost, "learn_seconds": round(learn_s), "erased": 0, "erased_answered": 0,
    }  # fmt: skip
    if erase:
        newest = max(bench.cut_of.values())
        erased = rng.sample(
            found := [fact for fact in bench.facts if bench.cut_of[fact.name] == newest], min(erase, len(found))
        )
        rest = [fact for fact in bench.facts if fact not in erased]
        began = time.monotonic()
        bench.erase(erased)
        erase_s = time.monotonic() - began
        bench.load()
        gone, left = bench.score(erased, adapted=True), bench.score(rest, adapted=True)
        figures |= {
            "erased": len(erased), "erased_answered": gone.right, "rest_learned_pct": left.taught,
            "rest_paraphrase_pct": left.unseen, "erase_seconds": round(erase_s),
        }  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
