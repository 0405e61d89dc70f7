from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from scripts.diffusion.schedule import GaussianDiffusion
from scripts.report.metrics import (
    SubjectGrades,
    epoch_columns,
    epoch_values,
    grade_losses,
    grading_scores,
    mask_scores,
    sampled_losses,
    training_grades,
)
from scripts.training.losses import MultiTaskLoss

NAMES = ["LGG", "HGG"]
TWO = {"LGG": 0, "HGG": 1}


def two(*positive):
    """Probabilities of two grades from those of the second grade."""
    return [[1 - p, p] for p in positive]


def test_the_log_loss_is_that_of_scikit_learn():
    prob, truth = np.array([[0.2, 0.5, 0.3], [1, 0, 0], [0.1, 0.1, 0.8]]), np.array([1, 2, 2])
    expected = sklearn.metrics.log_loss(truth, prob, labels=[0, 1, 2])
    assert grade_losses(prob, truth)["log_loss"] == pytest.approx(expected, rel=1e-12)
    assert math.isnan(grade_losses(prob[:0], truth[:0])["log_loss"])


def cube(shape=(1, 10, 10, 10), start=2, stop=6):
    mask = torch.zeros(shape)
    mask[:, start:stop, start:stop, start:stop] = 1
    return mask


def test_mask_scores_in_closed_form():
    truth, pred = cube(), torch.roll(cube(), 1, dims=1)
    scores = mask_scores(pred, truth, [2.0, 1.0, 1.0], ["WT"])
    assert scores["dice_WT"] == pytest.approx(0.75)
    assert scores["iou_WT"] == pytest.approx(0.6)
    assert scores["hd95_WT"] == pytest.approx(2.0)  # one voxel of 2 mm


@pytest.mark.parametrize(
    ("pred", "truth", "expected"),
    [
        (torch.zeros(1, 10, 10, 10), torch.zeros(1, 10, 10, 10), (1.0, 1.0, 0.0)),
        (cube(), torch.zeros(1, 10, 10, 10), (0.0, 0.0, math.sqrt(300))),
        (torch.zeros(1, 10, 10, 10), cube(), (0.0, 0.0, math.sqrt(300))),
    ],
)
def test_empty_masks_are_defined(pred, truth, expected):
    scores = mask_scores(pred, truth, [1.0, 1.0, 1.0], ["WT"])
    assert tuple(scores.values()) == pytest.approx(expected)


def test_regions_are_scored_apart():
    truth = torch.cat([cube(), cube(start=3, stop=5)])
    scores = mask_scores(torch.cat([cube(), torch.zeros(1, 10, 10, 10)]), truth, [1, 1, 1], ["WT", "ET"])
    assert scores["dice_WT"] == 1
    assert scores["dice_ET"] == 0


def test_grading_scores_in_closed_form():
    scores = grading_scores([0, 0, 1, 1], two(0.1, 0.6, 0.4, 0.9), NAMES)
    assert scores == pytest.approx({"auc": 0.75, "f1": 0.5, "f1_LGG": 0.5, "f1_HGG": 0.5, "accuracy": 0.5})


def test_one_class_or_none_is_undefined_not_a_crash():
    scores = grading_scores([1, 1], two(0.9, 0.8), NAMES)
    assert math.isnan(scores["auc"])
    assert scores["accuracy"] == scores["f1_HGG"] == scores["f1"] == 1
    assert all(math.isnan(value) for value in grading_scores([], [], NAMES).values())


def test_three_grades_one_against_the_rest():
    grade, prob = [0, 1, 2, 2], [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.5, 0.4], [0.1, 0.1, 0.8]]
    scores = grading_scores(grade, prob, ["G2", "G3", "G4"])
    # AUC of G2: 0.6 exceeds all others; G3: 0.4 exceeds 2 of 3; G4: both exceed both others
    assert scores["auc"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert scores["accuracy"] == 0.5
    assert [scores[f"f1_{name}"] for name in ("G2", "G3", "G4")] == pytest.approx([2 / 3, 0, 2 / 3])
    assert scores["f1"] == pytest.approx(4 / 9)
    absent = grading_scores(grade[:2], prob[:2], ["G2", "G3", "G4"])
    assert absent["auc"] == pytest.approx(1.0)  # the mean of the two grades that are present
    assert math.isnan(absent["f1_G4"])


def test_columns_follow_the_grades():
    assert epoch_columns(TWO) == [
        "dice", "iou", "auc", "f1", "f1_LGG", "f1_HGG", "accuracy", "L_seg", "L_calib", "L_draw", "L_first",
        "L_sample", "L_cls", "L_total", "sigma_seg", "sigma_cls", "alpha_LGG", "alpha_HGG", "grad_norm",
    ]  # fmt: skip
    three = {"G2": 0, "G3": 1, "G4": 2}
    assert {"f1_G4", "alpha_G2", "alpha_G4"} <= set(epoch_columns(three))
    values = epoch_values(MultiTaskLoss(GaussianDiffusion(), [1.0, 2.0, 3.0]), [1.0, 2.0, 3.0], three)
    assert values == pytest.approx({"sigma_seg": 1, "sigma_cls": 1, "alpha_G2": 1, "alpha_G3": 2, "alpha_G4": 3})


def test_slices_are_averaged_by_area_before_any_score():
    metric = SubjectGrades(TWO)
    # a: HGG in a slice with a large area, LGG in one with a small area; b: LGG; c: unknown grade
    metric.update(
        (["a", "b", "c"], torch.tensor(two(0.9, 0.2, 0.0)), torch.tensor([1, 0, -1]), torch.tensor([9, 5, 5]))
    )
    metric.update(
        (["a", "b", "c"], torch.tensor(two(0.0, 0.2, 0.0)), torch.tensor([1, 0, -1]), torch.tensor([1, 5, 5]))
    )
    scores = metric.compute()
    assert scores["accuracy"] == scores["auc"] == 1
    metric.reset()
    assert math.isnan(metric.compute()["auc"])


def test_training_grades_leave_out_empty_slices():
    label = torch.zeros(2, 1, 4, 4)
    label[0, 0, 0, 0] = 1
    targets = {"label": label, "grade": torch.tensor([1, 1]), "subject": ["a", "b"]}
    subjects, prob, grade, area = training_grades(
        {"pred": (torch.ones(2, 1, 4, 4), torch.zeros(2, 2), None), "label": targets}
    )
    assert (subjects, grade.tolist(), area.tolist()) == (["a", "b"], [1, -1], [16, 16])
    assert prob.tolist() == [[0.5, 0.5]] * 2


def test_hd95_of_a_picture_is_that_of_its_outlines():
    truth, pred = torch.zeros(1, 64, 64, 1), torch.zeros(1, 64, 64, 1)
    truth[:, 10:40, 10:40] = 1
    pred[:, 14:40, 10:40] = 1
    assert mask_scores(pred, truth, [1, 1, 1], ["WT"])["hd95_WT"] == 4.0


def test_validation_losses_are_of_the_sampled_mask():
    loss = MultiTaskLoss(GaussianDiffusion(prediction_type="epsilon"), alpha=[2.0, 1.0])
    label = cube()
    item = {
        "prob": 0.8 * label + 0.1 * (1 - label),
        "label": label,
        "grade_prob": torch.tensor([0.75, 0.25]),
        "grade": 0,
    }
    components = dict(sampled_losses([item], loss))
    expected = loss.mask_loss(torch.logit(item["prob"])[None], label[None]).item()
    assert components["L_seg"] == pytest.approx(expected, rel=1e-4)
    assert components["L_cls"] == pytest.approx(-2 * 0.25**2 * math.log(0.75), rel=1e-4)
    del item["grade_prob"]
    ungraded = dict(sampled_losses([item], loss))
    assert "L_cls" not in ungraded
