"""Losses of synthesis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import SSIMLoss
from torch import nn

from scripts.config import InputError

RANGE = 2.0  # of the values, which are in -1 to 1
WINDOW = 11  # of the SSIM, pixels


class PyramidLoss(nn.Module):
    """L1 + SSIM at several resolutions, mean over them.

    Args:
        resolutions: factors by which the slices are made smaller by average pooling; 1 is the full resolution.
        ssim_weight: of the SSIM loss; the L1 loss has weight 1.
    """

    def __init__(self, resolutions: Sequence[int] = (1,), ssim_weight: float = 1.0) -> None:
        super().__init__()
        if not resolutions or any(not isinstance(factor, int) or factor < 1 for factor in resolutions):
            raise InputError(f"resolutions={resolutions!r} must be a list of whole numbers, 1 or more")
        self.resolutions = list(resolutions)
        self.ssim_weight = ssim_weight
        self.ssim = SSIMLoss(spatial_dims=2, data_range=RANGE, win_size=WINDOW)

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of ``[B, 1, H, W]``.

        Raises:
            InputError: for slices that are smaller than the window of the SSIM at one of the resolutions.
        """
        smallest = min(pred.shape[2:]) // max(self.resolutions)
        if smallest < WINDOW:
            raise InputError(f"slices of {smallest} px are too small for the SSIM; remove the largest of 'resolutions'")
        total = pred.new_zeros(())
        for factor in self.resolutions:
            one, two = (nn.functional.avg_pool2d(part.float(), factor) for part in (pred, target))
            total = total + nn.functional.l1_loss(one, two) + self.ssim_weight * self.ssim(one, two)
        return total / len(self.resolutions)
