from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import CalibrationErrorMetric

from scripts.report.uncertainty import (
    COVERAGE,
    calibration_bins,
    error_auroc,
    expected_calibration_error,
    nonconformity,
    region_of_interest,
    risk_coverage,
    size_unit,
    volume_estimate,
    volume_interval,
)


@pytest.fixture
def voxels():
    rng = np.random.default_rng(0)
    prob = rng.random(50_000)
    return prob, rng.random(50_000) < prob


def test_the_error_is_monais(voxels):
    prob, truth = voxels
    prob = prob**2  # miscalibrated
    metric = CalibrationErrorMetric()
    metric(torch.tensor(prob, dtype=torch.float32)[None, None], torch.tensor(truth).float()[None, None])
    ece = expected_calibration_error(calibration_bins(prob, truth)[None])
    assert ece == pytest.approx(metric.aggregate().item(), abs=1e-5)
    assert ece > 0.1


def test_true_probabilities_are_calibrated(voxels):
    assert expected_calibration_error(calibration_bins(*voxels)[None]) < 0.01


def test_subjects_are_pooled_by_voxels():
    # the errors of the two subjects cancel if their voxels are pooled
    bins = np.stack([calibration_bins(np.full(100, 0.5), np.full(100, v)) for v in (True, False)])
    assert expected_calibration_error(bins) == pytest.approx(0)
    assert expected_calibration_error(bins[:1]) == pytest.approx(0.5)
    assert np.isnan(expected_calibration_error(np.zeros((1, 3, 20))))
    assert calibration_bins(np.array([]), np.array([])).sum() == 0


def test_region_of_interest_is_the_dilated_union():
    pred, label = np.zeros((15, 15, 15), bool), np.zeros((15, 15, 15), bool)
    assert not region_of_interest(pred, label).any()
    pred[7, 7, 7] = True
    assert region_of_interest(pred, label)[7, 7, 10]
    assert not region_of_interest(pred, label)[7, 7, 11]
    label[0, 0, 0] = True
    assert region_of_interest(pred, label)[0, 0, 3]


def test_error_auroc():
    error = np.array([False, False, True, True])
    assert error_auroc(np.array([0.1, 0.2, 0.8, 0.9]), error) == 1
    assert error_auroc(np.array([0.9, 0.8, 0.2, 0.1]), error) == 0
    assert np.isnan(error_auroc(np.ones(4), np.zeros(4, bool)))


def test_risk_coverage():
    error = np.zeros(1000, bool)
    error[-100:] = True
    sure_first = risk_coverage(np.linspace(0, 1, 1000), error)
    assert sure_first[COVERAGE <= 0.9].max() == 0
    assert sure_first[-1] == pytest.approx(0.1)
    assert risk_coverage(np.linspace(1, 0, 1000), error)[9] == 1


def test_volume_of_a_certain_mask():
    prob = np.zeros((10, 10, 10))
    prob[:] = 0.01  # a low probability everywhere
    prob[2:6, 2:6, 2:6] = 1
    estimate = volume_estimate(prob, prob > 0.5)
    assert estimate["expected"] == estimate["low"] == estimate["high"] == 64
    assert estimate["dice"] == 1
    empty = np.zeros((4, 4, 4))
    assert volume_estimate(empty, empty > 0) == {"expected": 0, "low": 0, "high": 0, "dice": 1}
    assert volume_estimate(prob, prob > 1)["dice"] == 0
    half = (prob > 0.5) & (np.arange(10) < 4)
    assert volume_estimate(prob, half)["dice"] == pytest.approx(2 * 32 / (64 + 32))


def test_volume_and_dice_are_those_of_drawn_truths():
    """Mean, quantiles and Dice agree with those of true masks {prob > u}, where u is drawn for each mask."""
    rng = np.random.default_rng(0)
    prob = np.linspace(0, 1, 2001)[1:-1]
    mask = (prob > 0.4) & (prob < 0.9)
    estimate = volume_estimate(prob, mask)
    levels = rng.random(5000)
    drawn = np.array([(prob > u).sum() for u in levels])
    dice = np.array([2 * (mask & (prob > u)).sum() for u in levels]) / (drawn + mask.sum())
    assert estimate["expected"] == pytest.approx(drawn.mean(), rel=0.03)
    assert estimate["low"] == pytest.approx(np.quantile(drawn, 0.05), abs=20)
    assert estimate["high"] == pytest.approx(np.quantile(drawn, 0.95), abs=20)
    assert estimate["dice"] == pytest.approx(dice.mean(), abs=0.02)


def test_volume_intervals_are_widened_by_the_margin():
    assert volume_interval(8.0, 27.0, 0.0) == pytest.approx((8, 27))
    assert volume_interval(8.0, 27.0, 1.0) == pytest.approx((1, 64))
    assert volume_interval(8.0, 27.0, 3.0) == pytest.approx((0, 216))  # no volume is below 0
    assert all(map(np.isnan, volume_interval(8.0, 27.0, math.inf)))
    for true in (1.0, 30.0):  # the margin that just covers a volume is its score
        low, high = volume_interval(8.0, 27.0, nonconformity(8.0, 27.0, true))
        assert true == pytest.approx(low) or true == pytest.approx(high)


def test_sizes_of_pictures_are_in_pixels():
    prob = MetaTensor(torch.zeros(1, 4, 4, 1), affine=np.diag([0.5, 0.5, 2.0, 1.0]))

    def item(file):
        return {"prob": prob, "pred": MetaTensor(torch.zeros(1), meta={"filename_or_obj": file})}

    assert size_unit(item("a.nii.gz")).column("true", "", "WT") == "true_volume_ml_WT"
    assert size_unit(item("a.nii.gz")).voxel == pytest.approx(0.0005)
    assert size_unit(item("a.png")).column("", "low", "disc") == "area_low_px_disc"
    assert size_unit(item("a.png")).voxel == 1
