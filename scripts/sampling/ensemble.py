"""Several samples of one mask: fusion into one, and how much they differ."""

from __future__ import annotations

import numpy as np
import torch

FUSIONS = ("mean", "majority", "staple")


def fuse(samples: torch.Tensor, fusion: str) -> torch.Tensor:
    """Probability ``[R, ...]`` from sampled probabilities ``[N, R, ...]``.

    ``mean``: their mean. ``majority``: share of the samples above one half. ``staple``: probability of the truth by
    STAPLE (:func:`staple`), region by region.
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
        Probability of the truth ``[H, W, S]``, and each sample's sensitivity and specificity. Samples that all agree
        are the truth; ITK gives NaN where all are empty.
    """
    import itk  # takes seconds to load

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
    """Mean Dice ``[R]`` over pairs of sampled probabilities ``[N, R, ...]``, cut at one half.

    Two empty masks agree (1). NaN for one sample: it has no pair.
    """
    masks = (samples > 0.5).flatten(2).float().transpose(0, 1)  # [R, N, voxels]
    overlap = masks @ masks.transpose(1, 2)
    size = masks.sum(dim=2)
    total = size[:, :, None] + size[:, None, :]
    dice = torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)
    upper = torch.triu_indices(len(samples), len(samples), offset=1)
    return dice[:, upper[0], upper[1]].mean(dim=1)
