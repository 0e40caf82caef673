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
    allow_deterministic_only()


def allow_deterministic_only() -> None:
    """Allow deterministic kernels only, in the whole process.

    PyTorch would also fill each new tensor before it is written, so that code which reads memory that was never written
    repeats its results, too. No code here does, and the filling took a tenth of the time of training.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
