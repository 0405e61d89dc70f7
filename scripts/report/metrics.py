"""Metrics: losses over an epoch, grades per subject, masks per volume."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.metrics import Metric
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from scripts.data.grades import grade_names
from scripts.distributed import gather_from_all
from scripts.sampling.probability import area_weighted_mean
from scripts.training.losses import MultiTaskLoss, graded_slices

# MONAI's Hausdorff distance calls a deprecated argument of its own
warnings.filterwarnings("ignore", message=".*get_mask_edges:always_return_as_numpy", category=FutureWarning)

EPOCH_PANELS = {  # the learning curves
    "losses": ["L_seg", "L_calib", "L_draw", "L_first", "L_sample", "L_cls", "L_total"],
    "Dice and IoU": ["dice", "iou"],
    "grading per subject": ["auc", "f1", "accuracy"],
    "sigma": ["sigma_seg", "sigma_cls"],
    "learning rate": ["learning_rate"],
    "gradient norm": ["grad_norm"],
}


def epoch_columns(grade_labels: Mapping[str, int]) -> list[str]:
    """Columns of the epoch table of segmentation and grading."""
    names = grade_names(grade_labels)
    return [
        *("dice", "iou", *grading_columns(names)),
        *EPOCH_PANELS["losses"],
        *EPOCH_PANELS["sigma"],
        *(f"alpha_{name}" for name in names),
        "grad_norm",
    ]


def epoch_values(loss: MultiTaskLoss, alpha: Sequence[float], grade_labels: Mapping[str, int]) -> dict[str, float]:
    """Current sigmas and class weights, the columns of the epoch table that are no metrics."""
    return loss.sigmas | {f"alpha_{name}": alpha[i] for i, name in enumerate(grade_names(grade_labels))}


def grading_columns(names: Sequence[str]) -> list[str]:
    """Names of the scores that :func:`grading_scores` returns."""
    return ["auc", "f1", *(f"f1_{name}" for name in names), "accuracy"]


def sampled_losses(output: Sequence[Mapping[str, Any]], loss: MultiTaskLoss) -> Iterable[tuple[str, torch.Tensor]]:
    """Loss components of one sampled volume: the training losses of its mask, calibration map and grade."""
    (item,) = output
    prob, label = torch.as_tensor(item.get("seg_prob", item["prob"]))[None], torch.as_tensor(item["label"])[None]
    calib_prob = item["prob"] if "seg_prob" in item else item.get("calib_prob")  # of a stochastic network, and others
    calib = None if calib_prob is None else torch.logit(torch.as_tensor(calib_prob)[None], eps=1e-6)
    cls_logits = torch.as_tensor(item["grade_prob"])[None].clamp(1e-6, 1).log() if "grade_prob" in item else None
    grade = torch.tensor([int(item["grade"])], device=prob.device)
    with torch.no_grad():
        loss(
            (torch.logit(prob, eps=1e-6), cls_logits, calib),
            {"label": label, "grade": grade, "empty": torch.tensor([True])},
        )
    return loss.components.items()


class SubjectGrades(Metric):
    """AUC, F1 and accuracy per subject. The slices of a subject are averaged first, weighted by predicted area.

    Updated with ``(subjects, grade_prob [B, K], grade [B], area [B])``; subjects with grade -1 are left out.

    Args:
        grade_labels: class index of each grade.
        output_transform: engine output to an update.
    """

    def __init__(self, grade_labels: Mapping[str, int], output_transform: Callable = lambda output: output) -> None:
        self.names = grade_names(grade_labels)
        super().__init__(output_transform, skip_unrolling=True)

    def reset(self) -> None:
        self.slices: dict[str, list[tuple[list[float], float]]] = defaultdict(list)
        self.grades: dict[str, int] = {}

    def update(self, output: tuple[Sequence[str], Sequence[torch.Tensor], torch.Tensor, torch.Tensor]) -> None:
        for subject, prob, grade, area in zip(*output, strict=True):
            if int(grade) >= 0:
                self.slices[subject].append((torch.as_tensor(prob).tolist(), float(area)))
                self.grades[subject] = int(grade)

    def compute(self) -> dict[str, float]:
        slices: dict[str, list[tuple[list[float], float]]] = defaultdict(list)
        for subject, rows in gather_from_all(list(self.slices.items())):
            slices[subject] += rows  # in training, several processes may have slices of one subject
        grades = dict(gather_from_all(list(self.grades.items())))
        prob = [
            area_weighted_mean(*(torch.tensor(column) for column in zip(*rows, strict=True))).tolist()
            for rows in slices.values()
        ]
        return grading_scores([grades[subject] for subject in slices], prob, self.names)


def training_grades(output: Mapping[str, Any]) -> tuple:
    """Update of :class:`SubjectGrades` from a training step: the slices that L_cls uses."""
    (seg_logits, cls_logits), targets = output["pred"][:2], output["label"]
    if cls_logits is None:
        return [], [], [], []
    prob = cls_logits.detach().float().softmax(dim=1)
    return targets["subject"], prob, graded_slices(targets), (seg_logits.detach() > 0).flatten(1).sum(dim=1)


def volume_grades(output: Sequence[Mapping[str, Any]]) -> tuple:
    """Update of :class:`SubjectGrades` from evaluated volumes."""
    graded = [item for item in output if "grade_prob" in item]
    columns = [[item[key] for item in graded] for key in ("subject", "grade_prob", "grade")]
    return (*columns, [1.0] * len(graded))


def grading_scores(grade: Sequence[int], prob: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """AUC (one against the rest, mean over the grades), macro F1, F1 per grade, and accuracy of the likeliest grade.

    An undefined score is NaN: all scores without a graded subject, the AUC of a grade that no subject or every subject
    has, the F1 of a grade that is neither present nor predicted. Means are over the defined values.

    Args:
        grade: class index of n subjects.
        prob: probability of each grade ``[n, K]``.
        names: names of the K grades.
    """
    columns = grading_columns(names)
    if len(grade) == 0:
        return dict.fromkeys(columns, float("nan"))
    truth, scores = np.asarray(grade), np.asarray(prob, float)
    predicted, classes = scores.argmax(axis=1), range(len(names))
    f1 = f1_score(truth, predicted, labels=list(classes), average=None, zero_division=np.nan)
    # with two grades both have the same AUC
    aucs = [_auc(truth == index, scores[:, index]) for index in (classes if len(names) > 2 else [1])]
    values = [mean_of_defined(aucs), mean_of_defined(f1), *f1, accuracy_score(truth, predicted)]
    return {column: float(value) for column, value in zip(columns, values, strict=True)}


def grade_losses(prob: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Brier score (0 to 1) and log loss of grade probabilities ``[n, K]`` and class indices ``[n]``; NaN for n = 0.

    There are too few subjects for a calibration error in bins.
    """
    if not len(truth):
        return {"brier": float("nan"), "log_loss": float("nan")}
    prob = prob / prob.sum(axis=1, keepdims=True)  # rounding in float32
    brier = float(np.square(prob - np.eye(prob.shape[1])[truth]).sum(axis=1).mean() / 2)
    likelihood = prob[np.arange(len(truth)), truth].clip(np.finfo(float).eps)  # as in scikit-learn, which is slow here
    return {"brier": brier, "log_loss": float(-np.log(likelihood).mean())}


def _auc(positive: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else float("nan")


def mean_of_defined(values: Sequence[float]) -> float:
    """Mean without NaN; NaN if all are."""
    defined = np.asarray(values)[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def mask_scores(
    pred: torch.Tensor, label: torch.Tensor, spacing: Sequence[float], regions: Sequence[str]
) -> dict[str, float]:
    """Dice, IoU and HD95 (mm) of binary volumes ``[R, H, W, S]``, as ``dice_WT`` and so on.

    A volume of one slice is scored in two dimensions: in three, every voxel would be surface.

    Empty masks: if both are empty, the result is perfect (Dice 1, IoU 1, HD95 0 mm). If one is empty, it is a miss
    (Dice 0, IoU 0, HD95 the diagonal of the volume, as in the BraTS challenge), so that misses count in a mean.
    """
    pred, label = torch.as_tensor(pred)[None].float(), torch.as_tensor(label)[None].float()
    if label.shape[-1] == 1:
        pred, label, spacing = pred[..., 0], label[..., 0], spacing[:2]
    dice = compute_dice(pred, label, ignore_empty=False)[0]
    iou = compute_iou(pred, label, ignore_empty=False)[0]
    diagonal = float(np.linalg.norm(np.asarray(spacing) * np.asarray(label.shape[2:])))
    scores: dict[str, float] = {}
    for channel, region in enumerate(regions):
        mask, truth = pred[:, [channel]], label[:, [channel]]
        if mask.any() and truth.any():
            hd95 = float(compute_hausdorff_distance(mask, truth, True, percentile=95, spacing=list(spacing)))
        else:
            hd95 = diagonal if mask.any() or truth.any() else 0.0
        scores |= {f"dice_{region}": float(dice[channel]), f"iou_{region}": float(iou[channel]), f"hd95_{region}": hd95}
    return scores
