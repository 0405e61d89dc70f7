"""Scores of sampled masks against the masks of several annotators, beside two baselines without sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from scripts.report.uncertainty import calibration_bins, region_of_interest, true_masks

METHODS = ("samples", "mask", "levels")  # "mask" and "levels" are the baselines
SCORES = ("ged", "diversity", "matched_iou", "crps", "coverage", "vote_brier")


def annotator_scores(
    item: Mapping[str, Any], channel: int, prob: np.ndarray, voxel: float
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores of one region of an evaluated item, as ``<score>_<method>``, and the calibration bins of each method.

    The methods are ``samples``, the sampled masks; ``mask``, the one mask that is saved; and ``levels``, as many level
    sets {prob > u} of the one calibrated map, with u in the middle of equal steps.

    - ``ged``: squared generalized energy distance, see :func:`energy_distance`.
    - ``diversity``: mean distance 1 - IoU of two masks. ``diversity_annotators`` is that of the annotators.
    - ``matched_iou``: see :func:`matched_iou`.
    - ``crps``: continuous ranked probability score of the volume, in the unit of ``voxel``.
    - ``coverage``: share of the annotators whose volume lies between the 5 and the 95 % quantile of the volumes.
    - ``vote_brier`` and the bins: of the probability of a voxel (the map for ``levels``, else the mean of the masks)
      against the share of the annotators who count it, near the lesion: the union of all masks, dilated by 3 voxels.

    Args:
        item: an evaluated item with ``pred [R, H, W, S]``, ``annotations [A * R, H, W, S]`` and
            ``samples [N * R, H, W, S]``.
        channel: number of the region.
        prob: calibrated probability of the region ``[H, W, S]``.
        voxel: size of a voxel.
    """
    pred = np.asarray(torch.as_tensor(item["pred"])[channel].cpu()) > 0
    annotations = true_masks(item, channel)
    samples = torch.as_tensor(item["samples"]).unflatten(0, (-1, len(item["pred"])))[:, channel]
    samples = np.asarray(samples.cpu()) > 0.5
    lesion = region_of_interest(np.any([pred, *samples], axis=0), np.any(annotations, axis=0))
    used = lesion | (prob > 0.5 / len(samples))  # outside, no mask has a voxel
    annotations, lesion, prob = annotations[:, used], lesion[used], prob[used]
    levels = (np.arange(len(samples)) + 0.5) / len(samples)
    masks = {"samples": samples[:, used], "mask": pred[None, used], "levels": prob > levels[:, None]}
    share = annotations.mean(axis=0)
    truth = annotations.sum(axis=1) * voxel
    scores, bins = {"diversity_annotators": mean_distance(annotations)}, {}
    for name, found in masks.items():
        mean = prob if name == "levels" else found.mean(axis=0)
        volumes = found.sum(axis=1) * voxel
        values = {
            "ged": energy_distance(found, annotations),
            "diversity": mean_distance(found),
            "matched_iou": matched_iou(found, annotations),
            "crps": crps(volumes, truth),
            "coverage": quantile_coverage(volumes, truth),
            "vote_brier": float(np.square(mean - share)[lesion].mean()) if lesion.any() else math.nan,
        }
        scores |= {f"{score}_{name}": value for score, value in values.items()}
        bins[name] = calibration_bins(mean[lesion], share[lesion])
    return scores, bins


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 - IoU ``[n, m]`` of masks ``[n, V]`` and ``[m, V]`` of V voxels; 0 for two empty masks."""
    one, two = first.astype(np.float32), second.astype(np.float32)
    overlap = one @ two.T
    union = one.sum(axis=1)[:, None] + two.sum(axis=1)[None] - overlap
    return np.where(union > 0, 1 - overlap / np.maximum(union, 1), 0.0)


def mean_distance(masks: np.ndarray) -> float:
    """Mean 1 - IoU of two different masks of ``[n, V]``; 0 for one mask, which never differs from itself."""
    n = len(masks)
    return float(distances(masks, masks).sum() / (n * (n - 1))) if n > 1 else 0.0


def energy_distance(samples: np.ndarray, annotations: np.ndarray) -> float:
    """Squared generalized energy distance of masks ``[n, V]`` and ``[m, V]`` with d = 1 - IoU, without bias.

    2 E d(s, y) - E d(s, s') - E d(y, y') (Szekely and Rizzo 2013; Kohl et al., NeurIPS 2018). Published code also
    counts the pairs of a mask with itself, so that a few diverse samples look worse than they are. Without these pairs
    the estimate of equal distributions is 0 on average, and may be negative.
    """
    return float(2 * distances(samples, annotations).mean()) - mean_distance(samples) - mean_distance(annotations)


def matched_iou(samples: np.ndarray, annotations: np.ndarray) -> float:
    """Mean IoU of samples and annotators, matched one to one by the Hungarian method (Kohl et al. 2019).

    Both sets are repeated to their least common multiple, so that every sample and every annotator counts equally.
    """
    size = math.lcm(len(samples), len(annotations))
    cost = distances(samples, annotations)
    square = cost[np.arange(size)[:, None] % len(samples), np.arange(size)[None] % len(annotations)]
    return float(1 - square[linear_sum_assignment(square)].mean())


def crps(values: np.ndarray, truth: np.ndarray) -> float:
    """Continuous ranked probability score of an ensemble ``[n]``, mean over the true values ``[m]``.

    E |x - y| - E |x - x'| / 2 over pairs of different members, which is fair to small ensembles (Ferro 2014). With one
    member it is the absolute error.
    """
    n = len(values)
    spread = np.abs(values[:, None] - values[None]).sum() / (n * (n - 1)) if n > 1 else 0.0
    return float(np.abs(values[:, None] - truth[None]).mean() - spread / 2)


def quantile_coverage(values: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true values ``[m]`` between the 5 and the 95 % quantile of an ensemble ``[n]``."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(((truth >= low) & (truth <= high)).mean())
