"""Losses of a discriminator and of the network that it judges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scripts.config import InputError

GAN_LOSSES = ("hinge", "lsgan", "softplus")
Features = Sequence[Sequence[torch.Tensor]]  # of each scale; the last of each scale are its logits


class GanLoss:
    """Losses of the logits of patches, mean over patches and scales.

    ``hinge`` (Lim and Ye 2017) has no tanh, which MONAI's PatchAdversarialLoss adds. ``lsgan`` is of Mao et al. (ICCV
    2017), ``softplus`` is the cross entropy of Goodfellow et al. (2014).

    Args:
        kind: one of :data:`GAN_LOSSES`.
        label_smoothing: by how much the target of true slices is below 1.

    Raises:
        InputError: for another kind, or a smoothing outside 0 to 0.5.
    """

    def __init__(self, kind: str = "hinge", label_smoothing: float = 0.0) -> None:
        if kind not in GAN_LOSSES:
            raise InputError(f"gan_loss '{kind}' is not one of {list(GAN_LOSSES)}")
        if not 0 <= label_smoothing < 0.5:
            raise InputError(f"adversary::label_smoothing={label_smoothing} must be 0 or more, and below 0.5")
        self.kind, self.target = kind, 1 - label_smoothing

    def of_discriminator(self, real: Features, fake: Features) -> torch.Tensor:
        """Loss that is low if true slices get high logits and made ones low logits."""
        return _mean([self._discriminator(one[-1], two[-1]) for one, two in zip(real, fake, strict=True)])

    def of_network(self, fake: Features) -> torch.Tensor:
        """Loss that is low if made slices get high logits."""
        return _mean([self._network(scale[-1]) for scale in fake])

    def _discriminator(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        if self.kind == "hinge":
            return nn.functional.relu(self.target - real).mean() + nn.functional.relu(1 + fake).mean()
        if self.kind == "lsgan":
            return ((real - self.target).square().mean() + fake.square().mean()) / 2
        smoothed = self.target * nn.functional.softplus(-real) + (1 - self.target) * nn.functional.softplus(real)
        return smoothed.mean() + nn.functional.softplus(fake).mean()

    def _network(self, fake: torch.Tensor) -> torch.Tensor:
        if self.kind == "hinge":
            return -fake.mean()
        if self.kind == "lsgan":
            return (fake - 1).square().mean()
        return nn.functional.softplus(-fake).mean()


def feature_matching(real: Features, fake: Features) -> torch.Tensor:
    """Mean distance of the features of made slices to those of true ones, relative to the size of the latter.

    pix2pixHD (Wang et al., CVPR 2018) adds absolute distances, so that its weight depends on the discriminator; here
    each layer is divided by the mean magnitude of its true features.
    """
    pairs = [pair for scales in zip(real, fake, strict=True) for pair in zip(*(s[:-1] for s in scales), strict=True)]
    return _mean([nn.functional.l1_loss(two, one) / one.abs().mean().clamp_min(1e-6) for one, two in pairs])


def gradient_penalty(logits: Features, slices: torch.Tensor) -> torch.Tensor:
    """R1 without its weight: mean over the batch of |d logit / d slice|^2 (Mescheder et al., ICML 2018, eq. 9).

    The logit of a slice is the mean over its patches, and over the scales.

    Args:
        logits: of the true slices.
        slices: ``[B, C, H, W]``, which require a gradient.
    """
    means = slice_scores(logits)
    (gradient,) = torch.autograd.grad(means.sum(), slices, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()


def slice_scores(features: Features) -> torch.Tensor:
    """Mean logit of each slice ``[B]`` over its patches, and over the scales."""
    return torch.stack([scale[-1].float().flatten(1).mean(dim=1) for scale in features]).mean(dim=0)


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean()
