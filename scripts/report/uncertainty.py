"""Scores of the uncertainty (calibration, detection of errors), and volume and Dice expected from a probability map."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import calibration_binning
from scipy.ndimage import binary_dilation
from sklearn.metrics import roc_auc_score

DILATION = 3  # voxels
COVERAGE = np.linspace(0.01, 1, 100)


def region_of_interest(pred: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Union of two masks ``[H, W, S]``, dilated by 3 voxels (city-block distance).

    Scores over all of the background would look too good, since nearly all of it is certain and right.
    """
    return binary_dilation(pred | label, iterations=DILATION)


def calibration_bins(prob: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Sum of probabilities, sum of truth and number of voxels ``[n]`` in 20 equal bins of probability: ``[3, 20]``."""
    y_pred, y = (torch.as_tensor(values, dtype=torch.float32)[None, None] for values in (prob, truth))
    mean_p, mean_gt, count = (values[0, 0].double().numpy() for values in calibration_binning(y_pred, y))
    return np.stack([np.nan_to_num(mean_p) * count, np.nan_to_num(mean_gt) * count, count])


def expected_calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error over all voxels of n subjects, whose :func:`calibration_bins` are ``[n, 3, 20]``.

    NaN if there are no voxels.
    """
    prob, truth, count = bins.sum(axis=0)
    return float(np.abs(prob - truth).sum() / count.sum()) if count.sum() else float("nan")


def error_auroc(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """AUROC of uncertainty ``[n]`` as a detector of wrong voxels ``[n]``; NaN if all are right or all are wrong."""
    return float(roc_auc_score(error, uncertainty)) if error.any() and not error.all() else float("nan")


def risk_coverage(uncertainty: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Share of wrong voxels ``[100]`` among the most certain 1 %, 2 %, ... 100 % of voxels ``[n]``."""
    wrong = np.cumsum(error[np.argsort(uncertainty, kind="stable")])
    kept = np.ceil(COVERAGE * len(error)).astype(int)
    return wrong[kept - 1] / kept


def volume_estimate(prob: np.ndarray, voxel_volume: float) -> dict[str, float]:
    """Expected volume, its 90 % interval and the expected Dice of the mask at 0.5, from ``prob [H, W, S]``.

    Errors of neighbouring voxels are correlated. The model is therefore: one random number u, uniform between 0 and 1,
    decides all voxels, and the true mask is the level set of voxels with prob > u. Then

    - the 90 % interval of the volume is given by the level sets at 0.95 and 0.05,
    - the expected volume is the mean volume of the level sets,
    - the expected Dice is the mean Dice of the level sets with the mask at 0.5; two empty masks have Dice 1.

    The means are over 20 levels from 0.025 to 0.975. A low probability everywhere adds nothing to the expected volume;
    it would add much to the sum of ``prob``. One probability map is enough; no second sample is needed.

    Args:
        prob: calibrated probability.
        voxel_volume: volume of one voxel (ml).
    """
    levels = np.linspace(0.025, 0.975, 20)
    prob = prob[prob > levels[0]]
    volumes = np.array([(prob > u).sum() for u in levels], dtype=float)
    low, mask, high = ((prob > u).sum() for u in (0.95, 0.5, 0.05))
    total = volumes + mask
    dice = np.where(total > 0, 2 * np.minimum(volumes, mask) / np.maximum(total, 1), 1.0)
    return {
        "volume_expected_ml": float(volumes.mean()) * voxel_volume,
        "volume_low_ml": float(low) * voxel_volume,
        "volume_high_ml": float(high) * voxel_volume,
        "expected_dice": float(dice.mean()),
    }
