"""Fits of masks: the temperature of their probability, and the Dice to expect."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logit
from sklearn.linear_model import LogisticRegression

from scripts.networks.calibration import MIN_CONFIDENCE, MIN_PROBABILITY

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def to_classes(prob: np.ndarray) -> np.ndarray:
    """Class probabilities ``[n, 2]`` of foreground probabilities ``[n]``."""
    prob = prob.astype(np.float64)
    return np.stack([1 - prob, prob], axis=-1)


def calibrate(prob: np.ndarray, temperature: float, bias: Sequence[float] = (0.0,)) -> np.ndarray:
    """softmax(log(prob) / temperature + bias) of class probabilities ``[n, K]`` (Guo et al., ICML 2017)."""
    return log_softmax(prob, temperature, bias).exp().numpy()


def log_softmax(prob: np.ndarray, temperature: float, bias: Sequence[float] = (0.0,)) -> torch.Tensor:
    logits = torch.as_tensor(prob, dtype=torch.float64).clamp(min=MIN_PROBABILITY).log()
    return torch.log_softmax(logits / temperature + torch.as_tensor(bias, dtype=torch.float64), dim=-1)


def fit_temperature(prob: np.ndarray, truth: np.ndarray) -> tuple[float]:
    """Temperature between 0.05 and 20 that minimises the log loss.

    Args:
        prob: class probabilities ``[n, K]``.
        truth: class indices ``[n]``.
    """
    target = torch.as_tensor(truth).long()

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.nll_loss(log_softmax(prob, np.exp(log_temperature)), target))

    bounds = (np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE))
    return (float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)),)


def fit_expected_dice(confidence: np.ndarray, dice: np.ndarray) -> tuple[float, float, float]:
    """Numbers of :func:`~scripts.networks.calibration.expected_dice`: bias, slope, and the Dice of an empty mask.

    Bias and slope are a logistic regression whose target is a share (Papke and Wooldridge, J. Appl. Econometrics 1996),
    with the regularisation that is scikit-learn's default: a few masks shift the mean more than the
    slope, which is 0 or more.
    Both are infinite if all masks are empty. An empty mask is expected to have 0.5, which the Dice of those of the fit
    (0 or 1) correct; 0.5 counts as one of them.

    Args:
        confidence: mean probability inside each mask ``[n]``, NaN for an empty one.
        dice: of the same masks ``[n]``.
    """
    empty = np.isnan(confidence)
    of_empty = float((dice[empty].sum() + 0.5) / (empty.sum() + 1))
    if empty.all():
        return math.inf, math.inf, of_empty
    scores = logit(confidence[~empty].astype(float).clip(MIN_CONFIDENCE, 1 - MIN_CONFIDENCE))
    mean, scale = scores.mean(), scores.std() if scores.std() > 1e-6 else 1.0
    share = dice[~empty].clip(MIN_CONFIDENCE, 1 - MIN_CONFIDENCE)  # neither class may be without weight
    model = LogisticRegression().fit(
        np.tile((scores - mean) / scale, 2)[:, None],
        np.repeat([1, 0], len(share)),
        sample_weight=np.append(share, 1 - share),
    )
    slope = max(0.0, model.coef_.item() / scale)  # by chance, the surer of a few masks may be the worse
    bias = model.intercept_.item() if slope else logit(share.mean())
    return float(bias - slope * mean), float(slope), of_empty
