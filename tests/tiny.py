"""A byte-level base model of a few thousand parameters, and examples for it, so that tests of learning are fast."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perennial.learner.model.base import Base
from perennial.streams.events.models import ExampleAccepted, Origin

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}"
    "{{ eos_token }}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte.

    Args:
        chat: Give it a chat template.
    """
    bytes_as_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *bytes_as_text))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    extra: dict[str, Any] = {"additional_special_tokens": ["<|user|>", "<|assistant|>"]} if chat else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", **extra
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def base(seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Return a random Llama over bytes: 2 layers of width 32."""
    torch.set_num_threads(1)  # more threads make so small a model slower, above all while other tests run
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + 256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)
    digest = "sha256:" + hashlib.sha256(f"tiny {seed}".encode()).hexdigest()
    return Base(model, tokenizer(), "tiny", digest, torch.device(device), dtype, 256)


def trained(texts: list[str], steps: int = 60) -> Base:
    """Return the tiny base after full training on texts, so that a test can see when an update makes it worse."""
    made = base()
    ids = [made.tokenizer(text)["input_ids"][:48] for text in texts]
    width = max(map(len, ids))
    rows = torch.tensor([[0, *row, 1] + [2] * (width - len(row)) for row in ids])  # (B, T)
    labels = rows.masked_fill(rows == 2, -100)
    made.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-2)
    for _ in range(steps):
        made.model(input_ids=rows, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.model.requires_grad_(False)
    return made


def document(number: int, text: str, adapter: str = "acme/support", partition: int = 0, **more: Any) -> ExampleAccepted:
    """Return a document whose offset is its number."""
    return ExampleAccepted(
        adapter=adapter, example_id=f"{number:032x}", kind="document", document_id=f"doc-{number}", learn=True,
        text=text, origin=origin(number, partition), **more,
    )  # fmt: skip


def correction(number: int, prompt: str, answer: str, adapter: str = "acme/support") -> ExampleAccepted:
    """Return a correction whose offset is its number."""
    return ExampleAccepted(
        adapter=adapter, example_id=f"{number:032x}", kind="correction", document_id=f"turn-{number}", learn=True,
        prompt=prompt, answer=answer, origin=origin(number),
    )  # fmt: skip


def origin(offset: int, partition: int = 0) -> Origin:
    """Return the origin of a record of the topic `documents`."""
    return Origin(
        cluster_id="cluster", topic="documents", topic_id="topic", partition=partition, offset=offset,
        timestamp_ms=1_700_000_000_000 + offset,
    )  # fmt: skip
