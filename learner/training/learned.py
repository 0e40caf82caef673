"""Decide whether an answer is learned, so that an update trains on a correction as often as it takes."""

from __future__ import annotations

import math

import torch

KNOWN_NATS = math.log(2)
"""Loss below which a token is more probable than all others together."""


def is_learned(nats: torch.Tensor) -> bool:
    """Return True if greedy decoding gives the answer: each of its tokens is the most probable (arXiv 2605.30260).

    Args:
        nats: Loss of each token of the answer (tokens,).
    """
    return bool((nats < KNOWN_NATS).all())
