"""Several samples of one mask: fuse them into one, and measure how much they differ."""

from __future__ import annotations

import numpy as np
import torch

FUSIONS = ("mean", "majority", "staple")


def fuse(samples: torch.Tensor, fusion: str) -> torch.Tensor:
    """Fuse N sampled probabilities ``[N, R, ...]`` into one probability ``[R, ...]``.

    ``mean``: mean of the samples. ``majority``: share of the samples above 0.5. ``staple``: probability of the true
    mask by :func:`staple`, for each region.
    """
    if fusion == "mean":
        return samples.mean(dim=0)
    masks = samples > 0.5
    if fusion == "majority":
        return masks.to(samples.dtype).mean(dim=0)
    return torch.stack([staple(region)[0] for region in masks.unbind(dim=1)]).to(samples)


def staple(masks: torch.Tensor) -> tuple[torch.Tensor, list[float], list[float]]:
    """Simultaneous truth and performance level estimation (Warfield et al., IEEE TMI 2004), by ITK.

    Args:
        masks: binary volumes ``[N, H, W, S]``, one per sample.

    Returns:
        Probability of the true mask ``[H, W, S]``, and the sensitivity and specificity of each sample. If all samples
        agree, they are the true mask: ITK would return NaN for empty samples.
    """
    import itk  # imported here because it takes seconds

    if (masks == masks[:1]).all():
        return masks[0].float(), [1.0] * len(masks), [1.0] * len(masks)
    image = itk.Image[itk.F, 3]
    estimate = itk.STAPLEImageFilter[image, image].New()
    for index, mask in enumerate(masks):
        estimate.SetInput(index, itk.image_from_array(np.ascontiguousarray(mask.cpu(), np.float32)))
    estimate.SetForegroundValue(1.0)
    estimate.Update()
    prob = torch.from_numpy(itk.array_from_image(estimate.GetOutput()))
    count = range(len(masks))
    return prob, [estimate.GetSensitivity(i) for i in count], [estimate.GetSpecificity(i) for i in count]


def pairwise_dice(samples: torch.Tensor) -> torch.Tensor:
    """Mean Dice ``[R]`` over all pairs of sampled probabilities ``[N, R, ...]``, thresholded at 0.5.

    Two empty masks have Dice 1. The result is NaN for a single sample, which has no pair.
    """
    masks = (samples > 0.5).flatten(2).float().transpose(0, 1)  # [R, N, voxels]
    overlap = masks @ masks.transpose(1, 2)
    size = masks.sum(dim=2)
    total = size[:, :, None] + size[:, None, :]
    dice = torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)
    upper = torch.triu_indices(len(samples), len(samples), offset=1)
    return dice[:, upper[0], upper[1]].mean(dim=1)
