"""Pretraining of the shipped base: corpus, tokenizer, training run, held-out loss and model card.

`python -m tools.pretrain_base --out DIR [--minutes N | --steps N] [--seed S]`. The service loads the files that this
script writes and needs nothing else of it. The script needs no network: all text comes from the Python that runs it.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tools.pretrain_corpus import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    USER,
    Corpus,
    answer_row,
    collect_corpus,
    long_lines,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 4096
MAX_POSITIONS = 512
BATCH_TOKENS = 2048
ROW_TOKENS = 256
LONG_ROW_EVERY = 4  # every fourth step uses rows of MAX_POSITIONS, so that every position is trained
MUON_PEAK_LR = 0.02
ADAMW_PEAK_LR = 3e-3
WARMUP = 0.02
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
DOCSTRING_PASSES = 2  # docstrings, the kind of text that the base is measured on, come twice an epoch, others once
ANSWER_SHARE = 0.05
EVAL_ROWS = 16

CARD = """# base-v1, the shipped base model

A Llama-architecture causal language model with {r.parameters:,} parameters (3 layers, hidden 256, 8 heads, 4
key/value heads, tied embeddings, {positions} positions) and its own byte-level BPE of {vocab} tokens. It is the
default base of Perennial, so that everything runs anywhere, without a download or an accelerator.

Held-out loss: {r.heldout_nats:.3f} nats/token

Measured after rounding to bf16, over {r.heldout_tokens:,} tokens of {held} docstrings that were not trained on; each
stands alone as bos, text, eos, cut at {positions} tokens. Docstrings of one library repeat each other: on the
{r.fresh_texts} held-out texts that share no line of 60 or more characters with the training text it is
{r.fresh_nats:.3f} nats/token.

## Data
Text of the standard library of CPython {python}, read from the installation that runs the script:
- {docstrings:,} docstrings of modules, classes and functions ({docstring_chars:,} characters), parsed, never imported;
- {extras:,} other texts ({extra_chars:,} characters): comment blocks, docstrings of the library's own tests and of
  modules written in C, and the language reference that `help()` shows;
- about {answer:.0%} of the tokens are prompt/answer rows made of names and first sentences of training docstrings.

A docstring's SHA-256 puts it into train (90 %), held-out (5 %) or anchor (5 %). Other texts that would fall into
the last two, or that carry a long line of them, are left out.

## Recipe
`OMP_WAIT_POLICY=passive python -m tools.pretrain_base --out learner/model/shipped/base-v1 --steps {r.steps} --seed {r.seed}`

Muon (peak rate {muon_lr}, weight decay {decay}) for the hidden matrices and AdamW (peak rate {adamw_lr}) for embedding
and gains; {warmup:.0%} warm-up, then cosine to zero; clipped at norm {clip}; {batch} tokens a step in packed rows of
{row} (every fourth step {positions}); training docstrings come {passes} times an epoch, other texts once; fp32.
This run: {r.steps:,} steps, {tokens_m:.1f}M tokens, {minutes:.0f} minutes on {r.threads} shared CPU threads
({rate:,.0f} tokens/s), torch {torch}. Its rate schedule followed the clock (`--minutes`), so `--steps` makes a like
model, not the same bytes. A longer schedule was not tried.

## Prompts
`<|bos|><|user|>What does json.dumps do?<|assistant|>` and the answer up to `<|eos|>`; ids 0 to 4 are `<|bos|>`,
`<|eos|>`, `<|pad|>`, `<|user|>`, `<|assistant|>`. The tokenizer adds none of them by itself.

## Use and limits
Made to have something real to adapt, gate, serve and forget in tests, demos and measurements of this project.
It writes text that looks like a docstring and knows little: what it says about an API is often wrong. English only,
no safety training; not for answering people. What adapters gain on it says little about large models.

## Licence
Trained on documentation of CPython, copyright Python Software Foundation, under the PSF License Version 2. The
weights and this card: Apache-2.0.
"""


@dataclass(frozen=True)
class Record:
    """The figures of a run that the model card states.

    Attributes:
        parameters: Number of parameters.
        steps: Number of optimizer steps.
        tokens: Number of tokens trained.
        wall_s: Duration of the training, in seconds.
        heldout_nats: Loss of the held-out docstrings, nats per token.
        heldout_tokens: Number of tokens that this was measured on.
        fresh_nats: Loss of those held-out docstrings that share no long line with the training text, nats per token.
        fresh_texts: Number of these docstrings.
        seed: Seed of the run.
        threads: CPU threads used.
    """

    parameters: int
    steps: int
    tokens: int
    wall_s: float
    heldout_nats: float
    heldout_tokens: int
    fresh_nats: float
    fresh_texts: int
    seed: int
    threads: int


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts.

    The special tokens have ids 0 to 4. The tokenizer adds none of them to a text by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """Return an untrained model (3.2M parameters, tied embeddings), drawn from torch's current seed."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=688,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def _token_stream(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the token ids (T,) of one document after another, reshuffled every epoch, without end."""
    backend = tokenizer.backend_tokenizer
    texts = [text for _, text in corpus.docstrings] * DOCSTRING_PASSES + list(corpus.extras)
    documents = [e.ids for e in backend.encode_batch([f"{BOS}{text}{EOS}" for text in texts])]
    answer_budget = ANSWER_SHARE * sum(map(len, documents))
    while True:
        epoch = list(documents)
        rows = (answer_row(name, text, rng) for name, text in corpus.docstrings)
        answers = [e.ids for e in backend.encode_batch([row for row in rows if row is not None])]
        used = 0
        for index in rng.permutation(len(answers)):
            if used >= answer_budget:
                break
            epoch.append(answers[index])
            used += len(answers[index])
        for index in rng.permutation(len(epoch)):
            yield np.asarray(epoch[index], dtype=np.int64)


def _batches(stream: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yield batches of packed rows, (8, 256) or (4, 512); a row may begin inside a document."""
    left_over = np.empty(0, dtype=np.int64)
    step = 0
    while True:
        parts, size = [left_over], left_over.size
        while size < BATCH_TOKENS:
            parts.append(next(stream))
            size += parts[-1].size
        tokens = np.concatenate(parts)
        left_over = tokens[BATCH_TOKENS:]
        row = MAX_POSITIONS if step % LONG_ROW_EVERY == LONG_ROW_EVERY - 1 else ROW_TOKENS
        yield torch.from_numpy(tokens[:BATCH_TOKENS].reshape(-1, row))  # (B, T)
        step += 1


def heldout_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[float, int]:
    """Measure the mean loss of texts, each alone as bos, text, eos, cut at `MAX_POSITIONS` tokens.

    Args:
        model: Causal language model on the CPU.
        tokenizer: Its tokenizer.
        texts: Texts to measure, at least one.

    Returns:
        Nats per predicted token, and the number of predicted tokens.
    """
    backend = tokenizer.backend_tokenizer
    rows = [e.ids[:MAX_POSITIONS] for e in backend.encode_batch([f"{BOS}{t}{EOS}" for t in texts])]
    rows.sort(key=len)
    pad = SPECIAL_TOKENS.index(PAD)
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), EVAL_ROWS):
            part = rows[start : start + EVAL_ROWS]
            width = len(part[-1])
            ids = torch.tensor([r + [pad] * (width - len(r)) for r in part])  # (B, T)
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in part])  # (B, T)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int((labels != -100).sum())
    model.train(training)
    return total / count, count


def _rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(model).to(torch.bfloat16)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bf16), config and tokenizer to the folder `out`.

    Each file is replaced as a whole, so that a reader never sees half a file.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        _rounded(model).save_pretrained(work)
        tokenizer.save_pretrained(work)
        for path in sorted(Path(work).iterdir()):
            # Replacing equal bytes would only make a reader's copy look changed.
            target = out / path.name
            if not target.exists() or target.read_bytes() != path.read_bytes():
                path.chmod(0o644)  # safetensors makes its file private
                path.replace(target)


def lr_factor(progress: float) -> float:
    """Return the share of the peak learning rate at a progress of 0 to 1: linear warm-up, then cosine to zero."""
    if progress < WARMUP:
        return max(progress, WARMUP / 100) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for the tied embedding and the gains, as Jordan et al. pair them.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalizes the update: a step takes about
    a third longer, and far fewer steps are needed.
    """
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    return [
        torch.optim.Muon(hidden, lr=MUON_PEAK_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAMW_PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def pretrain(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    *,
    minutes: float,
    steps: int | None,
    seed: int,
    checkpoint: Callable[[LlamaForCausalLM], None],
    log: Callable[[str], None],
    clock: Callable[[], float],
    checkpoint_every_s: float = 300.0,
) -> tuple[LlamaForCausalLM, Record]:
    """Train a new model for a wall-clock budget or for an exact number of steps.

    With `steps` the learning rates do not depend on the clock, so the same seed, texts and threads give the same run.

    Args:
        corpus: Texts to train and to measure on.
        tokenizer: Tokenizer trained on the corpus.
        minutes: Wall-clock budget; ignored where `steps` is given.
        steps: Exact number of steps; None to train for `minutes`.
        seed: Seed of the weights and of the order of the texts.
        checkpoint: Called with the model now and then, to save and measure it.
        log: Called with a line of progress every 100 steps.
        clock: Monotonic clock, in seconds.
        checkpoint_every_s: Seconds between checkpoints; the first one comes after at most 120 seconds.

    Returns:
        The trained model, and the figures for the model card.
    """
    torch.manual_seed(seed)
    model = new_model().train()
    optimizers = _optimizers(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    batches = _batches(_token_stream(corpus, tokenizer, np.random.default_rng(seed)))
    began = saved = clock()
    saved -= checkpoint_every_s - min(120.0, checkpoint_every_s)  # the first checkpoint comes early
    steps_done, window = 0, []
    while True:
        elapsed_s = clock() - began
        progress = steps_done / steps if steps else elapsed_s / (60 * minutes)
        if progress >= 1:
            break
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(progress)
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps_done += 1
        window.append(loss.item())
        if steps_done % 100 == 0:
            speed = steps_done * BATCH_TOKENS / (clock() - began)
            log(f"{progress:6.1%}  step {steps_done}  train {np.mean(window):.3f} nats  {speed:,.0f} tokens/s")
            window.clear()
        if clock() - saved >= checkpoint_every_s:
            checkpoint(model)
            saved = clock()
    wall_s = clock() - began
    shipped = _rounded(model).float()  # measured as it will be loaded, after rounding to bf16
    nats, count = heldout_loss(shipped, tokenizer, corpus.heldout)
    trained_lines = long_lines(corpus.texts)
    fresh = [text for text in corpus.heldout if trained_lines.isdisjoint(long_lines([text]))]
    record = Record(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=steps_done,
        tokens=steps_done * BATCH_TOKENS,
        wall_s=wall_s,
        heldout_nats=nats,
        heldout_tokens=count,
        fresh_nats=heldout_loss(shipped, tokenizer, fresh)[0],
        fresh_texts=len(fresh),
        seed=seed,
        threads=torch.get_num_threads(),
    )
    return model, record


def model_card(corpus: Corpus, record: Record) -> str:
    """Return the model card of a run, so that its figures are never copied by hand."""
    docstring_chars = sum(len(text) for _, text in corpus.docstrings)
    version = ".".join(map(str, sys.version_info[:3]))
    return CARD.format(
        r=record,
        positions=MAX_POSITIONS,
        vocab=VOCAB_SIZE,
        answer=ANSWER_SHARE,
        muon_lr=MUON_PEAK_LR,
        adamw_lr=ADAMW_PEAK_LR,
        passes=DOCSTRING_PASSES,
        decay=WEIGHT_DECAY,
        warmup=WARMUP,
        clip=CLIP_NORM,
        batch=BATCH_TOKENS,
        row=ROW_TOKENS,
        tokens_m=record.tokens / 1e6,
        held=len(corpus.heldout),
        docstrings=len(corpus.docstrings),
        docstring_chars=docstring_chars,
        extras=len(corpus.extras),
        extra_chars=sum(map(len, corpus.extras)),
        minutes=record.wall_s / 60,
        rate=record.tokens / record.wall_s,
        python=version,
        torch=torch.__version__.split("+")[0],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole recipe and write the model folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_base", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock budget")
    parser.add_argument("--steps", type=int, help="exact number of steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    console = Console()
    corpus = collect_corpus()
    tokenizer = train_tokenizer(corpus.texts)
    console.log(
        f"{len(corpus.docstrings)} docstrings and {len(corpus.extras)} other texts to learn,"
        f" {sum(map(len, corpus.texts)):,} characters; {len(corpus.heldout)} docstrings held out"
    )

    def checkpoint(model: LlamaForCausalLM) -> None:
        nats, _ = heldout_loss(model, tokenizer, corpus.heldout)
        console.log(f"held-out {nats:.3f} nats/token")
        save(model, tokenizer, args.out)

    model, record = pretrain(
        corpus,
        tokenizer,
        minutes=args.minutes,
        steps=args.steps,
        seed=args.seed,
        checkpoint=checkpoint,
        log=console.log,
        clock=time.monotonic,
    )
    save(model, tokenizer, args.out)
    (args.out / "MODEL_CARD.md").write_text(model_card(corpus, record), "utf-8")
    console.log(record)


if __name__ == "__main__":
    main()
