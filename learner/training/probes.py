"""Record what a version predicts after fixed texts, so that a backend can tell whether an engine serves that version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from perennial.learner.model.lora import Lora
from perennial.learner.model.loss import autocast, ignore_step, next_token_logits
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.storage.registry.manifest import Probes

_TOKENS = 8
"""Tokens recorded per text: few enough to be among the 20 that an engine returns, also after its rounding."""
_DECIMALS = 4


def predicted_after(
    texts: Mapping[str, str],
    lora: Lora,
    codec: ExampleTokenizer,
    lock: AbstractContextManager[object] | None = None,
    on_step: Callable[[], None] = ignore_step,
) -> Probes:
    """Return the most probable tokens after each text under the slot's weights.

    Args:
        texts: Texts by name.
        lora: Slot over the base, with the weights loaded.
        codec: Tokenizer of the base.
        lock: Lock on the base, held for each forward pass.
        on_step: Called after each forward pass, without the lock.

    Returns:
        By name of the text: the token ids, as text, with their log-probabilities in nats. Texts that are longer than the
        base takes are left out, and those after which a log-probability is not finite.
    """
    device = torch.device(lora.base.device)
    found: Probes = {}
    rows = {name: codec.text_ids(text) for name, text in texts.items()}
    for name, row in rows.items():
        if len(row) >= lora.base.max_positions:
            continue
        with lock or nullcontext():
            lora.select()
            with torch.no_grad(), autocast(device):
                logits = next_token_logits(lora.model, row, device)
        nats, ids = logits.float().log_softmax(-1).topk(min(_TOKENS, logits.numel()))  # (_TOKENS,), (_TOKENS,)
        if bool(nats.isfinite().all()):
            pairs = zip(ids.tolist(), nats.tolist(), strict=True)
            found[name] = {str(token): round(value, _DECIMALS) for token, value in pairs}
        on_step()
    return found
