"""A normal distribution of mask logits, from which whole masks are drawn in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from scripts.networks.unets import ImageUNet

RANK = 10  # of the covariance, as in the paper
MIN_DEVIATION = 1e-3
DISTRIBUTION = ("mean", "factors", "deviation")  # names of its parameters


class StochasticUNet(ImageUNet):
    r"""Stochastic segmentation network (Monteiro et al., NeurIPS 2020): a low-rank normal distribution of the logits.

    .. math:: \eta = \mu + F \epsilon + \sqrt{d} \odot \epsilon', \quad \epsilon, \epsilon' \sim N(0, I)

    The factors F join the voxels that an annotator counts together. Draws are made directly, without the covariance
    matrix, whose Cholesky decomposition fails on a uniform background. The marginal probability is the calibration map.

    Args:
        in_channels: M, number of modalities.
        num_regions: R.
        channels: channels of its levels, first C.
    """

    def __init__(self, in_channels: int, num_regions: int, channels: Sequence[int]) -> None:
        self.parts = [num_regions, RANK * num_regions, num_regions]
        super().__init__(in_channels, sum(self.parts), channels)

    def forward(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Map ``[B, M, H, W]`` to the distribution of the logits, by name, and decoded features ``[B, C, H, W]``.

        The distribution is float32: ``mean [B, R, H, W]``, mu; ``factors [B, K * R, H, W]`` of rank K;
        ``deviation [B, R, H, W]``, the square root of d; and ``calib_map [B, R, H, W]``, the logits of the marginal
        probability E sigmoid(eta), by the approximation of MacKay (Neural Computation 1992).
        """
        output, _, decoded = super().forward(x)
        mean, factors, diagonal = output.float().split(self.parts, dim=1)
        deviation = nn.functional.softplus(diagonal) + MIN_DEVIATION
        variance = factors.square().unflatten(1, (RANK, -1)).sum(dim=1) + deviation.square()
        calib_map = mean / (1 + math.pi / 8 * variance).sqrt()
        return {"calib_map": calib_map, "mean": mean, "factors": factors, "deviation": deviation}, decoded


def spread_noise(count: int, seed: int) -> torch.Tensor:
    """Normal noise ``[1, N, K]`` for the factors of N draws, spread evenly (scrambled Sobol points).

    Each draw is normal, but a few of them represent the distribution better than independent ones would (Owen 1998).
    """
    points = torch.quasirandom.SobolEngine(RANK, scramble=True, seed=seed).draw(count)
    return torch.special.ndtri(points.double().clamp(1e-6, 1 - 1e-6)).float()[None]


def draw_logits(distribution: Mapping[str, torch.Tensor], common: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """N draws of the logits ``[B, N, R, H, W]``.

    Args:
        distribution: result of :class:`StochasticUNet`.
        common: normal noise epsilon ``[B, N, K]``.
        own: normal noise epsilon' ``[B, N, R, H, W]``.
    """
    mean, factors, deviation = (distribution[name] for name in DISTRIBUTION)
    joint = torch.einsum("bnk,bkrhw->bnrhw", common, factors.unflatten(1, (RANK, -1)))
    return mean[:, None] + joint + deviation[:, None] * own


def negative_log_likelihood(draws: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Monte Carlo estimate of -log p(label), divided by the number of voxels (Monteiro et al., equation 8).

    Args:
        draws: logits of N draws ``[B, N, R, H, W]``.
        label: ``[B, R, H, W]`` of 0 and 1.
    """
    each = nn.functional.binary_cross_entropy_with_logits(draws, label[:, None].expand_as(draws), reduction="none")
    likelihood = torch.logsumexp(-each.flatten(2).sum(dim=2), dim=1) - math.log(draws.shape[1])
    return -likelihood.mean() / label[0].numel()
