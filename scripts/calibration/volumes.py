"""Intervals of volumes: what predicts a volume, and the margin by which conformal prediction widens the interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from scripts.networks.calibration import MIN_PROBABILITY
from scripts.report.uncertainty import LEVELS, nonconformity

COVERAGE = 0.9
LOGITS = np.linspace(-18.5, 18.5, 741)  # thresholds at which the volume of a probability map is kept


class Volume(NamedTuple):
    """True volume of one mask, in ml or pixels, and what predicts it."""

    curve: np.ndarray  # see volume_curve
    sampled: dict[str, float]  # see sampled_volume; empty without samples
    true: float
    patient: str

    def score(self, volumes_from: str, temperature: float) -> float:
        """:func:`nonconformity` of the interval that is not corrected; ``temperature`` scales the probability."""
        if volumes_from == "samples":
            return nonconformity(self.sampled["low"], self.sampled["high"], self.true)
        low, high = (volume_at(self.curve, level, temperature) for level in LEVELS)
        return nonconformity(low, high, self.true)


def conformal_margin(scores: Sequence[float], patients: Sequence[str]) -> float:
    """Margin that covers the next patient with a probability of 90 % (split conformal prediction).

    The score of a patient's subjects count together as one (pooled distribution; Dunn et al., JASA 2023).

    Args:
        scores: :func:`~scripts.report.uncertainty.nonconformity` of each subject.
        patients: patient of each subject.

    Returns:
        The margin; infinite for fewer than nine patients, which cannot give 90 %.
    """
    counts = {name: list(patients).count(name) for name in patients}
    if COVERAGE * (len(counts) + 1) > len(counts):
        return math.inf
    order = np.argsort(scores)
    weights = np.array([1 / counts[patients[i]] for i in order]) / (len(counts) + 1)
    reached = np.cumsum(weights) >= COVERAGE - 1e-9
    return float(np.asarray(scores)[order][reached][0])


def held_share(scores: Sequence[float], patients: Sequence[str]) -> float:
    """Share of the volumes inside of their intervals (:func:`nonconformity` up to 0); every patient counts equally."""
    return float(pd.Series(scores).le(1e-6).groupby(list(patients)).mean().mean())


def volume_curve(prob: np.ndarray) -> np.ndarray:
    """Number of voxels whose logit is above each of :data:`LOGITS`."""
    prob = np.clip(prob.astype(np.float64), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    counts = np.histogram(np.log(prob / (1 - prob)), bins=np.append(LOGITS, np.inf))[0]
    return np.cumsum(counts[::-1])[::-1].astype(float)


def volume_at(curve: np.ndarray, level: float, temperature: float) -> float:
    """Volume of the voxels whose probability is above ``level`` after division of the logits by ``temperature``."""
    return float(np.interp(temperature * math.log(level / (1 - level)), LOGITS, curve))
