"""Fits whose scores come from subjects that the fit did not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold

from scripts.calibration.fits import calibrate


def cross_fitted(
    probs: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    patients: Sequence[str],
    fit: Callable[..., tuple],
    apply: Callable[..., np.ndarray] = calibrate,
) -> list[np.ndarray]:
    """Each subject's probabilities, calibrated by a fit to other patients (five folds).

    The probabilities of a single patient are returned unchanged.
    """
    calibrated, num_patients = list(probs), len(set(patients))
    if num_patients > 1:
        for others, held_out in GroupKFold(min(5, num_patients)).split(calibrated, groups=patients):
            fitted = fit(*(np.concatenate([values[i] for i in others]) for values in (probs, truths)))
            for i in held_out:
                calibrated[i] = apply(probs[i], *fitted)
    return calibrated


def scored_fit(
    probs: list[np.ndarray],
    truths: list[np.ndarray],
    patients: list[str],
    fit: Callable[..., tuple],
    scores: Callable[..., dict],
    apply: Callable[..., np.ndarray] = calibrate,
) -> tuple[dict[str, Any], tuple]:
    """The scores before, after and cross-fitted; and what was fitted to all subjects.

    Args:
        probs: of each subject, what is calibrated.
        truths: of each subject.
        patients: patient of each subject.
        fit: numbers from the concatenated ``probs`` and ``truths``.
        scores: of what was calibrated and the truth, by name.
        apply: calibrates with the numbers of ``fit``.
    """
    prob, truth = np.concatenate(probs), np.concatenate(truths)
    fitted = fit(prob, truth)
    held_out = np.concatenate(cross_fitted(probs, truths, patients, fit, apply))
    report = {
        "subjects": len(probs),
        "patients": len(set(patients)),
        "before": scores(prob, truth),
        "after": scores(apply(prob, *fitted), truth),
        "cross_fitted": scores(held_out, truth),
    }
    return report, fitted
