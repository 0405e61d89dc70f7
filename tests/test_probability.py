from __future__ import annotations

import math

import pytest
import torch

from scripts.networks.calibration import Calibration
from scripts.sampling.probability import area_weighted_mean, entropy_bits, temperature_scaled


def test_entropy():
    values = entropy_bits(torch.tensor([0.0, 0.5, 1.0, 0.25]))
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert values.tolist() == pytest.approx([0, 1, 0, expected])


def test_two_grades_scale_like_a_mask():
    prob, calibration = torch.tensor([0.1, 0.5, 0.9]), Calibration(1, 2, 0)
    calibration.grade_temperature.fill_(2.5)
    grades = calibration.calibrated_grades(torch.stack([1 - prob, prob], dim=-1))
    assert torch.allclose(grades[:, 1], temperature_scaled(prob, torch.tensor(2.5)), atol=1e-6)
    assert torch.allclose(grades.sum(dim=-1), torch.ones(3))


def test_another_prior_is_bayes_rule():
    """A test with likelihood ratio 3 at the prior 1 : 1, used where the prior is 1 : 9."""
    calibration = Calibration(1, 2, 0)
    prob = torch.tensor([0.25, 0.75])
    assert calibration.calibrated_grades(prob, [0.9, 0.1])[1].item() == pytest.approx(3 / (3 + 9))
    assert torch.allclose(calibration.calibrated_grades(prob, [0.5, 0.5]), prob)


def test_calibration_is_saved_with_its_sampling_settings_and_reset():
    fitted, loaded = Calibration(2, 3, 4), Calibration(2, 3, 4)
    fitted.grade_bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    fitted.sampling, fitted.volumes_from = {"sampler": "ddim", "start_timestep": None}, "samples"
    loaded.load_state_dict(fitted.state_dict())
    assert loaded.sampling == fitted.sampling
    assert loaded.volumes_from == "samples"
    assert loaded.grade_bias.tolist() == [0, 1, 2]
    loaded.reset()
    assert (loaded.sampling, loaded.volumes_from) == ({}, "levels")
    assert not loaded.grade_bias.any()
    assert loaded.volume_margin.isinf().all()


def test_area_weights_rows_and_no_area_weights_them_alike():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert area_weighted_mean(values, torch.tensor([3, 1])).tolist() == [0.75, 0.25]
    assert area_weighted_mean(values, torch.tensor([0, 0])).tolist() == [0.5, 0.5]
    assert area_weighted_mean(values[:, 0], torch.tensor([3, 1])).item() == 0.75
