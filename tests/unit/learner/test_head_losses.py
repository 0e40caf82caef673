"""The GPU's kernels of the head, in Triton's interpreter: losses and gradients as PyTorch computes them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from perennial.learner.together.kernels.head_losses import cross_entropy_, divergence_

torch.manual_seed(3)
tokens, words = 5, 9001  # three blocks, the last one not full
logits = (4 * torch.randn(tokens, words)).requires_grad_()
teacher = 4 * torch.randn(tokens, words)
labels, weights = torch.randint(words, (tokens,)), torch.rand(tokens)
with torch.no_grad():
    logits[1, 7] = float("nan")  # one adapter's token: no other row may see it

nats = torch.empty(tokens)
slopes = logits.detach().clone()
cross_entropy_(slopes, labels, weights, nats)
expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
(gradient,) = torch.autograd.grad(expected, logits, weights)
torch.testing.assert_close(nats, expected.detach(), equal_nan=True, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(slopes, gradient, equal_nan=True, rtol=1e-4, atol=1e-7)
assert torch.isfinite(nats[[0, 2, 3, 4]]).all() and torch.isnan(nats[1])

slopes = logits.detach().clone()
divergence_(slopes, teacher, weights, nats)
student, base = logits.log_softmax(-1), teacher.log_softmax(-1)
expected = (base.exp() * (base - student)).sum(-1)
(gradient,) = torch.autograd.grad(expected, logits, weights)
torch.testing.assert_close(nats, expected.detach(), equal_nan=True, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(slopes, gradient, equal_nan=True, rtol=1e-4, atol=1e-7)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: no Linux")
def test_the_kernels_compute_what_pytorch_computes() -> None:
    # The interpreter is chosen when the kernels are defined, so it needs a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
