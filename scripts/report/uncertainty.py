"""Scores of the uncertainty (calibration, detection of errors), and volume and Dice expected from a probability map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics import calibration_binning
from scipy.ndimage import binary_dilation
from sklearn.metrics import roc_auc_score

from scripts.data.pictures import is_picture

DILATION = 3  # voxels
COVERAGE = np.linspace(0.01, 1, 100)
LEVELS = (0.95, 0.05)  # of the level sets that bound the volume; the quantiles of samples are the same numbers


def region_of_interest(pred: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Union of two masks ``[H, W, S]``, dilated by 3 voxels (city-block distance).

    Scores over all of the background would look too good, since nearly all of it is certain and right.
    """
    return binary_dilation(pred | label, iterations=DILATION)


def true_masks(item: Mapping[str, Any], channel: int) -> np.ndarray:
    """Masks of the annotators ``[A, H, W, S]`` of one region of an evaluated item; the label if there is only one."""
    masks = torch.as_tensor(item["annotations" if "annotations" in item else "label"]).unflatten(
        0, (-1, len(item["pred"]))
    )
    return np.asarray(masks[:, channel].cpu()) > 0


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


class SizeUnit(NamedTuple):
    """What a mask's size is called, its unit, and the size of one voxel."""

    name: str
    unit: str
    voxel: float

    def column(self, prefix: str, kind: str, region: str) -> str:
        """Column of a table: ``true_volume_ml_WT``, ``area_low_px_disc``."""
        return "_".join(part for part in (prefix, self.name, kind, self.unit, region) if part)


def size_unit(item: Mapping[str, Any]) -> SizeUnit:
    """Volumes in ml for an evaluated item that is a volume; areas in pixels for a picture, which has no spacing."""
    if is_picture(item["pred"].meta["filename_or_obj"]):
        return SizeUnit("area", "px", 1.0)
    return SizeUnit("volume", "ml", float(np.prod(item["prob"].pixdim.tolist())) / 1000)


def nonconformity(low: float, high: float, true: float) -> float:
    """How far a true volume lies outside of ``low`` to ``high``; negative inside (Romano et al., NeurIPS 2019).

    All are compared as cube roots, because the errors of a radius are alike for small and large lesions.
    """
    low, high, true = np.cbrt([low, high, true])
    return float(max(low - true, true - high))


def volume_interval(low: float, high: float, margin: float) -> tuple[float, float]:
    """The interval ``low`` to ``high``, widened by a margin of :func:`nonconformity`; NaN if the margin is infinite."""
    if math.isinf(margin):
        return math.nan, math.nan
    widened = np.maximum(np.cbrt([low, high]) + np.array([-margin, margin]), 0) ** 3
    return float(widened[0]), float(max(widened))


def sampled_volume(volumes: torch.Tensor) -> dict[str, float]:
    """Mean (``expected``), 5 % quantile (``low``) and 95 % quantile (``high``) of the volumes of samples ``[N]``."""
    values = np.asarray(volumes.cpu(), float)
    low, high = np.quantile(values, LEVELS[::-1])
    return {"expected": float(values.mean()), "low": float(low), "high": float(high)}


def volume_estimate(prob: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Expected volume, volumes of two level sets, and expected Dice of a mask, from a probability map.

    Errors of neighbouring voxels are correlated. The model is therefore: one random number u, uniform between 0 and 1,
    decides all voxels, and the true mask is the level set of voxels with prob > u. Then

    - the expected volume is the mean volume of the level sets,
    - the level sets at 0.95 and 0.05 bound 90 % of the volumes: ``low`` and ``high``, which conformal prediction then
      corrects,
    - the expected Dice is the mean Dice of the level sets with the mask; two empty masks have Dice 1.

    The means are over 20 levels from 0.025 to 0.975. A low probability everywhere adds nothing to the expected volume;
    it would add much to the sum of ``prob``. One probability map is enough; no second sample is needed.

    Args:
        prob: calibrated probability ``[H, W, S]``.
        mask: predicted mask ``[H, W, S]``, of bool.

    Returns:
        ``expected``, ``low`` and ``high`` in voxels, and ``dice``.
    """
    levels = np.linspace(0.025, 0.975, 20)
    bounds = [float((prob > u).sum()) for u in LEVELS]
    total = np.full(len(levels), float(mask.sum()))
    prob, mask = prob[prob > levels[0]], mask[prob > levels[0]]
    volumes = np.array([(prob > u).sum() for u in levels], dtype=float)
    overlap = np.array([(prob[mask] > u).sum() for u in levels], dtype=float)
    total += volumes
    dice = np.where(total > 0, 2 * overlap / np.maximum(total, 1), 1.0)
    return {"expected": float(volumes.mean()), "low": bounds[0], "high": bounds[1], "dice": float(dice.mean())}
