"""Fits of grades: what the head and the measurements of the mask say."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from scripts.calibration.fits import MAX_TEMPERATURE, MIN_TEMPERATURE, log_softmax
from scripts.networks.calibration import MIN_PROBABILITY, standardised

SLOPE = (0.5, 0.5)  # mean and standard deviation of the prior of the grades' slopes
BIAS_SD = 0.5  # standard deviation of the prior of the grades' bias
MEASUREMENT_SD = 0.1  # the same, of what a standardised measurement adds to what the training subjects learned
MAX_SPREAD = 1.5  # logits are scaled so that the difference of two has at most this standard deviation
RIDGE = 0.1  # inverse strength C of the regularisation of the regression on the training subjects


class GradeFit(NamedTuple):
    """What is fitted to grades; see :class:`~scripts.networks.calibration.Calibration`."""

    temperature: float
    bias: np.ndarray  # [K]
    mean: np.ndarray  # of the measurements, [F]
    scale: np.ndarray  # [F]
    weight: np.ndarray  # [K, F]


class Measured(NamedTuple):
    """Measurements of the predicted masks of subjects that the network was trained on, and their grades."""

    measurements: np.ndarray  # [n, F], NaN where undefined
    truth: np.ndarray  # [n]


def fit_grades(
    prob: np.ndarray,
    truth: np.ndarray,
    prior_bias: np.ndarray,
    slope: tuple[float, float] = SLOPE,
    measurements: np.ndarray | None = None,
    trained: Measured | None = None,
    use_head: bool = True,
) -> GradeFit:
    """Weigh the head and the measurements against each other; for the head alone, Platt scaling with intercept.

    The loss is weighted by inverse frequency, so that the network assumes equal frequencies. ``prior_bias`` corrects
    this in closed form. Few patients must not change much, so all numbers have normal priors: the slopes of the head
    (its inverse temperature) and of the :func:`evidence` that the training subjects learn from measurements, the change
    of the bias, and what each measurement adds to that evidence. The slopes are expected below 1, because both are too
    sure of new subjects; ``benchmarks/grades.py`` compares priors. A network that knows its training subjects by heart
    gives huge logits, which this prior would not tame: they are scaled first (:data:`MAX_SPREAD`).

    Args:
        prob: class probabilities of the head ``[n, K]`` for subjects that the network was not trained on.
        truth: class indices ``[n]``.
        prior_bias: minus the log of the class weights of the loss, ``[K]``.
        slope: mean and standard deviation of the prior of the slopes.
        measurements: of the same subjects ``[n, F]``, NaN where undefined; None uses the head alone.
        trained: the same of the training subjects.
        use_head: false: the slope of the head is 0 and the temperature infinite.
    """
    target, grades = torch.as_tensor(truth).long(), len(prior_bias)
    found = np.zeros((len(prob), 0)) if measurements is None else measurements
    learned_from = Measured(found[:0], truth[:0]) if trained is None or measurements is None else trained
    mean, scale = _mean_and_scale(np.concatenate([found, learned_from.measurements]))
    scores, known = (
        standardised(*map(torch.as_tensor, (values, mean, scale))) for values in (found, learned_from.measurements)
    )
    learned, offset = evidence(known.numpy(), learned_from.truth, grades)
    head = torch.as_tensor(prob, dtype=torch.float64).clamp(min=MIN_PROBABILITY).log()
    sources = [head, scores @ learned.T + offset]
    spreads = [_spread(logits) for logits in sources]
    expected = torch.tensor([slope[0] * use_head, slope[0]], dtype=torch.float64)
    used = torch.tensor([float(use_head), 1.0], dtype=torch.float64)

    def loss(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.tensor(numbers, requires_grad=True)
        slopes, bias, own = values.split([2, grades, grades * scores.shape[1]])
        own = own.reshape(grades, scores.shape[1])
        combined = torch.as_tensor(prior_bias) + bias + scores @ own.T
        for logits, spread, value in zip(sources, spreads, slopes, strict=True):
            combined = combined + logits / spread * value
        likelihood = torch.nn.functional.cross_entropy(combined, target, reduction="sum")
        penalty = (bias / BIAS_SD).square().sum() + (own / MEASUREMENT_SD).square().sum()
        total = likelihood + 0.5 * (penalty + (used * (slopes - expected) / slope[1]).square().sum())
        (gradient,) = torch.autograd.grad(total, values)
        return float(total.detach()), gradient.numpy()

    limits = (1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE)
    bounds = [limits if use_head else (0.0, 0.0), limits, *[(None, None)] * (grades * (1 + scores.shape[1]))]
    start = np.zeros(len(bounds))
    start[:2] = np.minimum(expected, limits[1])
    best = minimize(loss, start, jac=True, bounds=bounds).x
    temperature = spreads[0] / best[0] if use_head else math.inf
    weight = best[1] / spreads[1] * learned.numpy() + best[2 + grades :].reshape(grades, scores.shape[1])
    bias = prior_bias + best[2 : 2 + grades] + best[1] / spreads[1] * offset.numpy()
    return GradeFit(float(temperature), bias, mean, scale, weight)


def evidence(scores: np.ndarray, truth: np.ndarray, num_grades: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What standardised measurements ``[n, F]`` say of the grades ``[n]``: weights ``[K, F]`` and offset ``[K]``.

    A logistic regression of scikit-learn with a ridge, less the log of the frequencies: the logits if all grades were
    equally frequent. Both are 0 for fewer than two grades, and for a grade that no subject has.
    """
    weights, offset = np.zeros((num_grades, scores.shape[1])), np.zeros(num_grades)
    classes, counts = np.unique(truth, return_counts=True)
    if len(classes) > 1 and scores.shape[1]:
        model = LogisticRegression(C=RIDGE, max_iter=1000).fit(scores, truth)
        found, intercept = model.coef_, model.intercept_
        if len(classes) == 2:  # one row for the difference
            found, intercept = (np.concatenate([-part, part]) / 2 for part in (found, intercept))
        weights[classes], offset[classes] = found, intercept - np.log(counts / counts.sum())
    return torch.as_tensor(weights), torch.as_tensor(offset)


def _spread(logits: torch.Tensor) -> float:
    """What logits ``[n, K]`` are divided by: as much as their spread exceeds :data:`MAX_SPREAD`, at least 1."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return max(1.0, 2 * float(centred.std(dim=0, correction=0).max()) / MAX_SPREAD)


def _mean_and_scale(measurements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each measurement ``[n, F]``; 0 and 1 if it is always NaN or the same."""
    table = pd.DataFrame(measurements, dtype=float)
    mean, scale = table.mean().fillna(0.0), table.std(ddof=0).fillna(0.0)
    return mean.to_numpy(), scale.where(scale > 1e-6, 1.0).to_numpy()


def calibrate_grades(prob: np.ndarray, measurements: np.ndarray, fitted: GradeFit) -> np.ndarray:
    """Calibrated probabilities ``[n, K]`` of those of the head ``[n, K]`` and measurements ``[n, F]``."""
    logits = log_softmax(prob, fitted.temperature, fitted.bias.tolist())
    if fitted.weight.size:
        scores = standardised(*map(torch.as_tensor, (measurements, fitted.mean, fitted.scale)))
        logits = logits + scores @ torch.as_tensor(fitted.weight).T
    return logits.softmax(dim=-1).numpy()
