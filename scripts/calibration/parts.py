"""Which parts of a mask to leave out: the threshold of their largest probability that makes the Dice best."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.ndimage import label, maximum, sum_labels
from scipy.special import expit

# thresholds that are tried; the first has no effect, and higher ones leave out whole tumours (docs/weights.md)
HIGH = expit(np.linspace(0, 9.25, 38)).astype(np.float32)


class Parts(NamedTuple):
    """Connected parts of one mask, ``[P]`` each, and the size of the true mask."""

    peak: np.ndarray  # largest probability by which a part is kept
    size: np.ndarray  # voxels
    shared: np.ndarray  # voxels of the true mask
    prob: np.ndarray  # sum of the probability
    true_size: int

    def dice(self, high: float) -> float:
        """Dice of the parts whose peak reaches a threshold; 1 if both masks are empty."""
        kept = self.peak >= high
        size = self.size[kept].sum() + self.true_size
        return float(2 * self.shared[kept].sum() / size) if size else 1.0

    def confidence(self, high: float) -> float:
        """Mean probability inside these parts; NaN if there are none."""
        kept = self.peak >= high
        return float(self.prob[kept].sum() / self.size[kept].sum()) if kept.any() else math.nan


def parts_of(mask: np.ndarray, truth: np.ndarray, seg_prob: np.ndarray, prob: np.ndarray) -> Parts:
    """Parts of a mask, as :func:`scripts.sampling.parts.without_unsure_parts` finds them.

    Args:
        mask: bool ``[H, W, S]``.
        truth: bool, of the same shape.
        seg_prob: probability of the mask, from which the peaks are read.
        prob: probability by which the network is sure; that of the calibration map in a stochastic network.
    """
    parts, count = label(mask)
    numbers = np.arange(1, count + 1)
    size, shared, total = (np.asarray(sum_labels(values, parts, numbers)) for values in (mask, truth, prob))
    peak = np.maximum(HIGH[0], np.asarray(maximum(seg_prob, parts, numbers), np.float32))  # less: of a nested region
    return Parts(peak, size, shared, total, int(truth.sum()))


def dice_curve(parts: Parts) -> np.ndarray:
    """Dice at each of :data:`HIGH` ``[1, C]``."""
    return np.array([[parts.dice(high) for high in HIGH]])


def fit_high_threshold(curves: np.ndarray, _: object = None) -> tuple[int]:
    """Position in :data:`HIGH` of the lowest threshold with the best mean of the curves ``[n, C]``."""
    return (int(curves.mean(axis=0).argmax()),)
