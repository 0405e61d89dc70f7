"""What a benchmark asks of the GPU, if there is one: to finish, and how much memory it took."""

from __future__ import annotations

import gc

import torch


def synchronize() -> None:
    """Wait until the GPU has done what it was given: calls return before that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_memory() -> None:
    """Free what nothing refers to, and count the largest allocation from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float | None:
    """Largest allocation on the GPU since :func:`start_memory`, GiB; None if nothing was allocated there."""
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    return peak or None
