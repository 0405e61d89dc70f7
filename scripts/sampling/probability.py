"""Functions of probabilities: temperature, entropy, weighted mean."""

from __future__ import annotations

import math

import torch

from scripts.networks.calibration import MIN_PROBABILITY


def temperature_scaled(prob: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """sigmoid(logit(prob) / temperature) (Guo et al., ICML 2017), any shape; what is above 0.5 stays above it."""
    return torch.where(
        temperature == 1, prob, torch.sigmoid(torch.logit(prob.double(), eps=MIN_PROBABILITY) / temperature).to(prob)
    )


def entropy_bits(prob: torch.Tensor) -> torch.Tensor:
    """Entropy of a Bernoulli probability in bits, any shape: 0 at 0 and 1, 1 at 0.5."""
    return torch.special.entr(prob).add(torch.special.entr(1 - prob)).div(math.log(2))


def area_weighted_mean(values: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Mean of ``values [n, ...]`` weighted by predicted ``area [n]``; the plain mean where every area is 0."""
    weight = area.float() if area.sum() > 0 else torch.ones(len(values), device=values.device)
    weighted = values.float() * weight.view(-1, *[1] * (values.ndim - 1))  # autocast would round a product of matrices
    return weighted.sum(dim=0) / weight.sum()
