"""Scores: losses over an epoch, grades per subject, masks per volume, bootstrap intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.metrics import Metric
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from scripts.distributed import gathered
from scripts.inferer import area_weighted_mean
from scripts.losses import MultiTaskLoss

GRADING_SCORES = ("auc", "f1", "f1_LGG", "f1_HGG", "accuracy")


class AverageLosses(Metric):
    """Epoch mean of each loss component; iterations without a component (no graded tumour) do not count for it.

    Args:
        output_transform: engine output to pairs of name and value (ignite keeps mappings for y_pred and y).
    """

    def reset(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def update(self, output: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, value in output:
            self.values[name].append(value)  # a number would make every iteration wait for the GPU

    def compute(self) -> dict[str, float]:
        values = gathered([(name, float(value)) for name, column in self.values.items() for value in column])
        names = list(dict.fromkeys(name for name, _ in values))
        return {name: float(np.mean([value for other, value in values if other == name])) for name in names}


def sampled_losses(output: Sequence[Mapping[str, Any]], loss: MultiTaskLoss) -> Iterable[tuple[str, torch.Tensor]]:
    """Loss components of one sampled volume: the training loss of the mean mask and of the subject's grade."""
    (item,) = output
    prob, label = torch.as_tensor(item["prob"])[None], torch.as_tensor(item["label"])[None]
    hgg = float(item["hgg_prob"])  # decollated: scalars are plain numbers
    cls_logits = None if np.isnan(hgg) else prob.new_tensor([[1 - hgg, hgg]]).clamp(1e-6, 1).log()
    grade = torch.tensor([int(item["grade"])], device=prob.device)
    with torch.no_grad():
        loss((torch.logit(prob, eps=1e-6), cls_logits, None), {"label": label, "grade": grade})
    return loss.components.items()


class SubjectGrades(Metric):
    """AUC, F1 and accuracy per subject: slices of one subject are averaged, weighted by tumour area, before any score.

    Updated with ``(subjects, hgg_prob [B], grade [B], area [B])``; subjects with grade -1 are left out.
    """

    def __init__(self, output_transform: Callable = lambda output: output) -> None:
        super().__init__(output_transform, skip_unrolling=True)

    def reset(self) -> None:
        self.slices: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.grades: dict[str, int] = {}

    def update(self, output: tuple[Sequence[str], torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        for subject, prob, grade, area in zip(*output, strict=True):
            if int(grade) >= 0 and not np.isnan(float(prob)):
                self.slices[subject].append((float(prob), float(area)))
                self.grades[subject] = int(grade)

    def compute(self) -> dict[str, float]:
        slices: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for subject, rows in gathered(list(self.slices.items())):
            slices[subject] += rows  # training may share a subject among processes
        grades = dict(gathered(list(self.grades.items())))
        prob = [float(area_weighted_mean(*torch.tensor(rows).T)) for rows in slices.values()]
        return grading_scores([grades[subject] for subject in slices], prob)


def training_grades(output: Mapping[str, Any]) -> tuple:
    """Update of :class:`SubjectGrades` from a training step: slices with true tumour, as L_cls has them."""
    (seg_logits, cls_logits, _), targets = output["pred"], output["label"]
    if cls_logits is None:
        return [], [], [], []
    hgg = cls_logits.detach().float().softmax(dim=1)[:, 1]
    grade = torch.where(targets["label"].flatten(1).any(dim=1), targets["grade"], -1)
    return targets["subject"], hgg, grade, (seg_logits.detach() > 0).flatten(1).sum(dim=1)


def volume_grades(output: Sequence[Mapping[str, Any]]) -> tuple:
    """Update of :class:`SubjectGrades` from evaluated volumes."""
    columns = [[item[key] for item in output] for key in ("subject", "hgg_prob", "grade")]
    return (*columns, [1.0] * len(output))


def grading_scores(grade: Sequence[int], prob: Sequence[float]) -> dict[str, float]:
    """AUC, macro F1, F1 per class and accuracy at P(HGG) >= 0.5.

    Undefined scores are NaN: all without a graded subject, AUC with subjects of one class, F1 of a class that
    is neither present nor predicted (macro F1 is the mean of the defined ones).
    """
    if len(grade) == 0:
        return dict.fromkeys(GRADING_SCORES, float("nan"))
    predicted = (np.asarray(prob) >= 0.5).astype(int)
    lgg, hgg = f1_score(grade, predicted, labels=[0, 1], average=None, zero_division=np.nan)
    return {
        "auc": float(roc_auc_score(grade, prob)) if len(set(grade)) == 2 else float("nan"),
        "f1": float(np.nanmean([lgg, hgg])),
        "f1_LGG": float(lgg),
        "f1_HGG": float(hgg),
        "accuracy": float(accuracy_score(grade, predicted)),
    }


def mask_scores(
    pred: torch.Tensor, label: torch.Tensor, spacing: Sequence[float], regions: Sequence[str]
) -> dict[str, float]:
    """Dice, IoU and HD95 (mm) of binary volumes ``[R, H, W, S]``, as ``dice_WT`` and so on.

    Masks of one slice are taken as flat: in three dimensions every voxel of theirs would be surface.

    Empty masks: both empty is perfect (Dice 1, IoU 1, HD95 0 mm); one empty is a miss (Dice 0, IoU 0, HD95 the
    diagonal of the volume, as in the BraTS challenge), so that misses do not vanish from a mean.
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


def with_intervals(
    statistic: Callable[..., Mapping[str, float]], *columns: Sequence[float], seed: int = 0, resamples: int = 1000
) -> dict[str, dict[str, float | None]]:
    """Named statistics of paired columns, each with its 95 % bootstrap interval over subjects (percentile method).

    Undefined values are None; resamples in which a statistic is undefined (one class only) are left out for it.
    """
    values = statistic(*map(np.asarray, columns))
    intervals = np.full((len(values), 2), np.nan)
    if len(columns[0]) > 1:
        drawn = bootstrap(
            columns,
            lambda *sample: np.array(list(statistic(*sample).values())),
            paired=True,
            vectorized=False,
            n_resamples=resamples,
            method="percentile",
            rng=seed,
        ).bootstrap_distribution
        for i, value in enumerate(values.values()):
            if not np.isnan(value):
                intervals[i] = np.nanpercentile(drawn[i], [2.5, 97.5])
    return {
        name: {key: None if np.isnan(x) else float(x) for key, x in zip(("value", "low", "high"), row, strict=True)}
        for name, row in zip(values, np.column_stack([list(values.values()), intervals]), strict=True)
    }
