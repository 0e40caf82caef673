"""General texts sampled from the frozen base itself: documents, and chat turns whose questions it writes itself too.

Nobody has the text that a base was trained on. What the base writes has the base's own distribution, so a rise of the
loss on it is a divergence from the base. Questions are sampled after the template's user header (Xu et al. 2024,
Magpie, arXiv 2406.08464) and answered greedily, as the base answers in service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Final

import torch

from perennial.learner.model.general_items import GeneralItem, GeneralItems
from perennial.learner.model.generation import Decoded, Sampling, decode
from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import ignore_step
from perennial.learner.model.tokenization import ExampleTokenizer

DOCUMENTS: Final = 96
TURNS: Final = 96
DOCUMENT_TOKENS: Final = 48
QUESTION_TOKENS: Final = 32
ANSWER_TOKENS: Final = 40
_TEMPERATURE: Final = 0.8
"""At 1 every tenth question of a small base makes no sense."""
_MIN_CHARS: Final = 12
_SENTENCE_ENDS: Final = (".", "?", "!", "。", "？", "！")

Report = Callable[[str], None]


def sample_base(
    lora: Lora,
    codec: ExampleTokenizer,
    report: Report,
    *,
    documents: int = DOCUMENTS,
    turns: int = TURNS,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
) -> GeneralItems:
    """Sample general texts from the base. The same base, seed, thread count and torch give the same texts.

    Args:
        lora: Slot over the base; its own weights are not used.
        codec: Tokenizer of the base.
        report: Called with a line for people after each part.
        documents: Number of documents to sample.
        turns: Number of questions to sample; those that make no whole sentence are left out.
        lock: Lock on the base, held for each forward pass.
        on_step: Called after each forward pass, without the lock.

    Returns:
        The texts: documents, and chat turns where the base has a chat template.
    """
    base = lora.base
    seed = int.from_bytes(sha256(f"general texts of {base.digest}".encode()).digest()[:8]) >> 1
    sampling = Sampling(_TEMPERATURE, torch.Generator().manual_seed(seed))
    control = {*getattr(base.tokenizer, "all_special_ids", ()), codec.eos}
    began = time.monotonic()

    def generate(prompts: Sequence[Sequence[int]], tokens: int, sampling: Sampling | None) -> list[Decoded]:
        return decode(
            lora, prompts, max_tokens=min(tokens, base.max_positions - max(map(len, prompts), default=0)), stop=control,
            pad=codec.pad, adapted=False, sampling=sampling, lock=lock, on_step=on_step,
        )  # fmt: skip

    report(f"sampling general texts from {base.name}, once; it takes about a minute for a base of 0.1 B parameters")
    written = generate([[codec.bos]] * documents, DOCUMENT_TOKENS, sampling)
    items = [GeneralItem(text, None, made.ended) for made in written if (text := _text(codec, made))]
    report(f"general texts: {len(items)} documents after {time.monotonic() - began:.0f} s")
    if codec.has_template:
        asked = [_question(codec, made) for made in generate([codec.turn_head] * turns, QUESTION_TOKENS, sampling)]
        questions = list(dict.fromkeys(question for question in asked if question))
        report(f"general texts: {len(questions)} questions after {time.monotonic() - began:.0f} s")
        prompts = [codec.prompt_ids(question, base.max_positions // 2) for question in questions]
        answers = generate(prompts, ANSWER_TOKENS, None)
        items += [
            GeneralItem(text, question, made.ended)
            for question, made in zip(questions, answers, strict=True)
            if (text := _text(codec, made))
        ]
    report(f"general texts: {len(items)} in all after {time.monotonic() - began:.0f} s")
    return GeneralItems("sample", base.digest, tuple(dict.fromkeys(items)))


def _text(codec: ExampleTokenizer, made: Decoded) -> str:
    """Return the text of an answer; empty where it is too short to be of use, or a part of a character."""
    text = str(codec.tokenizer.decode(list(made.ids), skip_special_tokens=True)).replace("\ufffd", "")
    return text if len(text.strip()) >= _MIN_CHARS else ""


def _question(codec: ExampleTokenizer, made: Decoded) -> str:
    """Return the question; where it was cut, up to its last whole sentence, empty if there is none."""
    text = _text(codec, made).strip()
    if made.ended or not text:
        return text
    end = max(text.rfind(mark) for mark in _SENTENCE_ENDS)
    return text[: end + 1] if end + 1 >= _MIN_CHARS else ""
