"""Differentiable augmentation of what a discriminator sees."""

from __future__ import annotations

import torch
from torch import nn

SHIFT = 1 / 8  # largest translation, of the side
BRIGHTNESS = 0.5  # largest change
HOLE = 1 / 2  # side of the square that is cut out, of the side


def augment(slices: torch.Tensor) -> torch.Tensor:
    """Change brightness, shift, and cut out a square (DiffAugment, Zhao et al., NeurIPS 2020).

    Each slice has its own change, which is the same for all of its channels.

    Args:
        slices: ``[B, C, H, W]``.
    """
    count, _, height, width = slices.shape
    brightness, (x, y), centre = (
        torch.rand(count, 1, 1, 1, device=slices.device) * 2 * BRIGHTNESS - BRIGHTNESS,
        (torch.rand(2, count, device=slices.device) * 2 - 1) * 2 * SHIFT,  # the side is 2 in the grid
        torch.rand(2, count, 1, 1, device=slices.device) * 2 - 1,
    )
    moved = torch.eye(2, 3, device=slices.device).repeat(count, 1, 1)
    moved[:, 0, 2], moved[:, 1, 2] = x, y
    grid = nn.functional.affine_grid(moved, [count, 1, height, width], align_corners=False)
    shifted = nn.functional.grid_sample((slices + brightness).float(), grid, align_corners=False)
    still = nn.functional.affine_grid(torch.eye(2, 3, device=slices.device)[None], [1, 1, height, width], False)
    hole = ((still[..., 0] - centre[0]).abs() < HOLE) & ((still[..., 1] - centre[1]).abs() < HOLE)
    return shifted * ~hole[:, None]
