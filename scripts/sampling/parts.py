"""Connected parts of a mask, of which those are left out in which the network is nowhere sure."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import label


def without_unsure_parts(pred: torch.Tensor, prob: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """``pred`` with 0 in each part of the mask ``pred > 0.5`` in which ``prob`` is below ``high`` everywhere.

    Voxels that share a face are connected. With ``pred`` for ``prob`` this is hysteresis thresholding (Canny, IEEE PAMI
    1986).

    Args:
        pred: ``[R, H, W, S]``.
        prob: probability of the same shape.
        high: threshold of each region ``[R]``; up to 0.5 has no effect.
    """
    kept = pred.clone()
    for channel in torch.nonzero(high > 0.5).flatten().tolist():
        parts, _ = label((pred[channel] > 0.5).cpu().numpy())
        sure = np.unique(parts[(prob[channel] >= high[channel]).cpu().numpy()])
        unsure = (parts > 0) & ~np.isin(parts, sure)
        kept[channel][torch.from_numpy(unsure).to(pred.device)] = 0
    return kept
