"""Changes that an arm makes to its weights between updates: a slow average of ΔW, and Reptile's step."""

from __future__ import annotations

import torch

from perennial.learner.model.lora import Tensors

_A, _B = ".lora_A.weight", ".lora_B.weight"


def average_products(slow: Tensors, fast: Tensors, kept: float) -> Tensors:
    """Return factors of kept · B_s A_s + (1 - kept) · B_f A_f, truncated to the rank.

    The products are averaged and never the factors: the average of two factors is not the factor of the average. The
    sum has rank 2r and the factors (out, 2r) and (2r, in); with the QR decompositions of both it is Q_b (R_b R_aᵀ) Q_aᵀ,
    and the SVD of the small core (2r, 2r) gives the best approximation of rank r (Eckart and Young 1936).

    Args:
        slow: Weights of the average so far, by PEFT's names: A (r, in) and B (out, r).
        fast: Weights that are averaged in, of the same shapes.
        kept: Share of the average so far that is kept, 0 to 1.
    """
    averaged: Tensors = {}
    for name in (name for name in slow if name.endswith(_A)):
        other = name.removesuffix(_A) + _B
        rank = slow[name].shape[0]
        left = torch.cat([kept * slow[other], (1 - kept) * fast[other]], dim=1).double()  # (out, 2r)
        right = torch.cat([slow[name], fast[name]], dim=0).double()  # (2r, in)
        left_q, left_r = torch.linalg.qr(left)
        right_q, right_r = torch.linalg.qr(right.T)
        u, singular, v = torch.linalg.svd(left_r @ right_r.T)
        root = singular[:rank].sqrt()
        averaged[other] = (left_q @ u[:, : len(root)] * root).float().contiguous()
        averaged[name] = ((right_q @ v[: len(root)].T * root).T).float().contiguous()
    return averaged


def reptile_step(start: Tensors, end: Tensors, share: float) -> Tensors:
    """Return θ0 + share · (θK - θ0), the outer step of Reptile (Nichol et al. 2018, arXiv 1803.02999).

    Args:
        start: Weights before the update.
        end: Weights after it.
        share: Size of the step, 0 to 1.
    """
    return {name: start[name] + share * (end[name] - start[name]) for name in start}
