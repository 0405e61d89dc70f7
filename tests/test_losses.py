from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceFocalLoss

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.training.losses import MIN_SIGMA, MultiTaskLoss, UncertaintyWeighting


def batch(regions=1):
    torch.manual_seed(0)
    label = (torch.rand(4, regions, 8, 8) > 0.7).float()
    label[3] = 0  # a slice without foreground
    outputs = (torch.randn(4, regions, 8, 8), torch.randn(4, 2), torch.randn(4, regions, 8, 8))
    targets = {"label": label, "grade": torch.tensor([0, 1, -1, 1]), "timesteps": torch.tensor([1, 10, 500, 999])}
    return tuple(out.requires_grad_() for out in outputs), targets


def test_segmentation_loss_in_closed_form():
    (seg, cls, calib), targets = batch()
    loss = MultiTaskLoss(GaussianDiffusion())
    loss((seg, cls, calib), targets)
    p, y = seg.sigmoid(), targets["label"]
    dice = 1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5)
    p_t = torch.where(y == 1, p, 1 - p)
    focal = ((1 - p_t) ** 1.5 * -p_t.log()).mean()
    assert loss.components["L_seg"] == pytest.approx((dice + 0.5 * focal).item(), rel=1e-5)


def test_segmentation_loss_and_gradient_are_monais():
    (seg, _, _), targets = batch()
    loss = MultiTaskLoss(GaussianDiffusion())
    ours = torch.autograd.grad(loss((seg, None, None), targets), seg)[0]
    monai = DiceFocalLoss(sigmoid=True, batch=True, gamma=1.5, lambda_focal=0.5)(seg, targets["label"])
    assert torch.allclose(ours, torch.autograd.grad(monai, seg)[0])


def test_grading_loss_in_closed_form_with_weights():
    (seg, cls, calib), targets = batch()
    loss = MultiTaskLoss(GaussianDiffusion(), alpha=[2.4276, 0.6297])
    loss((seg, cls, calib), targets)
    p = cls.softmax(dim=1)
    # slices 2 (no grade) and 3 (no foreground) do not count
    expected = sum(a * (1 - q) ** 2 * -q.log() for a, q in ((2.4276, p[0, 0]), (0.6297, p[1, 1]))) / 2
    assert loss.components["L_cls"] == pytest.approx(expected.item(), rel=1e-5)


def test_ungraded_and_empty_slices_get_no_grading_gradient():
    (seg, cls, calib), targets = batch()
    gradient = torch.autograd.grad(MultiTaskLoss(GaussianDiffusion())((seg, cls, calib), targets), cls)[0]
    assert gradient[:2].abs().min() > 0
    assert not gradient[2:].any()


def test_a_subject_without_any_lesion_is_graded():
    """A normal picture has an empty mask and a grade: all of its slices count."""
    (seg, cls, calib), targets = batch()
    targets["empty"] = torch.tensor([False, False, True, True])
    gradient = torch.autograd.grad(MultiTaskLoss(GaussianDiffusion())((seg, cls, calib), targets), cls)[0]
    assert gradient.abs().amax(dim=1).gt(0).tolist() == [True, True, False, True]  # slice 2 has no grade


def test_batch_without_graded_tumour_leaves_sigma_cls_alone():
    (seg, cls, calib), targets = batch()
    targets["grade"] = torch.full((4,), -1)
    loss = MultiTaskLoss(GaussianDiffusion())
    loss((seg, cls, calib), targets).backward()
    assert "L_cls" not in loss.components
    assert loss.weighting.log_sigma.grad[1] == 0
    assert loss.weighting.log_sigma.grad[0] != 0


def test_total_starts_as_the_sum():
    (seg, cls, calib), targets = batch()
    loss = MultiTaskLoss(GaussianDiffusion())
    total = loss((seg, cls, calib), targets)
    parts = {name: value.item() for name, value in loss.components.items()}
    assert loss.sigmas == pytest.approx({"sigma_seg": 1.0, "sigma_cls": 1.0})
    assert total.item() == pytest.approx(parts["L_seg"] + parts["L_calib"] + parts["L_cls"], rel=1e-5)
    assert parts["L_total"] == pytest.approx(total.item())


def test_without_grading_head_the_total_is_the_mask_loss():
    (seg, _, calib), targets = batch()
    loss = MultiTaskLoss(GaussianDiffusion())
    total = loss((seg, None, calib), targets)
    assert total.item() == pytest.approx((loss.components["L_seg"] + loss.components["L_calib"]).item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_other_prediction_types_regress(prediction_type):
    (seg, cls, calib), targets = batch()
    diffusion = GaussianDiffusion(prediction_type=prediction_type)
    loss = MultiTaskLoss(diffusion)
    loss((seg, cls, calib), targets)
    expected = diffusion.regression_loss(seg, 2 * targets["label"] - 1, targets["timesteps"])
    assert loss.components["L_seg"] == pytest.approx(expected.item(), rel=1e-5)
    assert loss.weighting.factor.tolist() == [0.5, 1.0]


def test_weighting_is_kendalls_away_from_the_floor():
    """Equation 10 of the paper: a regression counts 1 / (2 sigma^2), a classification 1 / sigma^2."""
    weighting = UncertaintyWeighting([True, False])
    with torch.no_grad():
        weighting.log_sigma.copy_(torch.tensor([1.0, 2.0]))
    total = weighting([torch.tensor(3.0), torch.tensor(5.0)]).item()
    kendall = 3 / (2 * math.exp(2)) + 1 + 5 / math.exp(4) + 2
    assert total == pytest.approx(kendall, abs=0.01)


@pytest.mark.parametrize(("regression", "expected"), [(True, 0.3), (False, 0.6)])
def test_weighting_finds_the_sigma_of_the_loss(regression, expected):
    weighting = UncertaintyWeighting([regression])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        weighting([torch.tensor(0.3)]).backward()
        optimizer.step()
    assert weighting.variance.item() == pytest.approx(expected, rel=0.01)


def test_weighting_stays_bounded_and_recovers_when_a_loss_reaches_zero():
    weighting = UncertaintyWeighting([True, True])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        total = weighting([torch.tensor(0.0), torch.tensor(0.5)])
        total.backward()
        optimizer.step()
    assert total.item() > 2 * math.log(MIN_SIGMA)
    assert 1 / (2 * weighting.variance[0].item()) <= 1 / (2 * MIN_SIGMA**2)
    for _ in range(4000):
        optimizer.zero_grad()
        weighting([torch.tensor(0.5), torch.tensor(0.5)]).backward()
        optimizer.step()
    assert weighting.variance[0].item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("task", ["segmentation", "grading"])
def test_a_single_task_is_its_loss_alone(task):
    (seg, cls, calib), targets = batch()
    leaves = [part.requires_grad_() for part in (seg, cls, calib)]
    loss = MultiTaskLoss(GaussianDiffusion(), tasks=[task])
    total = loss(tuple(leaves), targets)
    total.backward()
    names = ("L_seg", "L_calib") if task == "segmentation" else ("L_cls",)
    assert total.item() == pytest.approx(sum(loss.components[name].item() for name in names))
    learns = {"segmentation": [True, False, True], "grading": [False, True, False]}[task]
    assert [bool(leaf.grad.any()) for leaf in leaves] == learns  # the other gradients are zero, not None
    assert not loss.weighting.log_sigma.requires_grad


@pytest.mark.parametrize("tasks", [[], ["masks"], ["segmentation", "staging"]])
def test_bad_tasks(tasks):
    with pytest.raises(InputError, match="tasks="):
        MultiTaskLoss(GaussianDiffusion(), tasks=tasks)


def test_summed_tasks_have_no_weighting():
    outputs, targets = batch()
    loss = MultiTaskLoss(GaussianDiffusion(), task_weighting="sum")
    total = loss(outputs, targets)
    assert total.item() == pytest.approx(sum(loss.components[name].item() for name in ("L_seg", "L_calib", "L_cls")))
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    with pytest.raises(InputError, match="task_weighting 'mean'"):
        MultiTaskLoss(GaussianDiffusion(), task_weighting="mean")
