"""Settings that make PyTorch repeat its results bit for bit."""

from __future__ import annotations

import os

import torch


def make_deterministic(threads: int) -> None:
    """Make torch repeatable in this process: fix its thread count and allow deterministic kernels only.

    A version's bits depend on both, so a manifest records the thread count and forgetting sets it again before it
    rebuilds the version. CUDA reads `CUBLAS_WORKSPACE_CONFIG` when it starts: call this function before the first
    use of a GPU. See https://docs.pytorch.org/docs/stable/notes/randomness.html.

    Args:
        threads: CPU threads that one operation may use, 1 or more.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
