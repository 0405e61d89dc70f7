"""The grading head."""

from __future__ import annotations

import torch
from torch import nn


class Standardise(nn.BatchNorm1d):
    """Batch norm of ``[B, C]`` without learnt weights; a batch of one uses the running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        training = self.training and len(x) > 1
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=training, eps=self.eps)


class GradingHead(nn.Sequential):
    """Grade logits ``[B, K]`` from bottleneck features ``[B, C, h, w]``: pool, C -> C/2 -> K.

    The pooled features differ from slice to slice by about a hundredth of their size. Without standardisation the
    first layer sees a near-constant input: its ReLUs learn the class frequencies and die (docs/results.md).

    Args:
        channels: C.
        num_grades: K.
    """

    def __init__(self, channels: int, num_grades: int = 2) -> None:
        hidden = max(channels // 2, 1)
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            Standardise(channels),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, num_grades),
        )
