from __future__ import annotations

import math

import pytest
import torch

from scripts.sampling.probability import area_weighted_mean, entropy_bits, grade_temperature_scaled, temperature_scaled


def test_entropy():
    values = entropy_bits(torch.tensor([0.0, 0.5, 1.0, 0.25]))
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert values.tolist() == pytest.approx([0, 1, 0, expected])


def test_two_grades_scale_like_a_mask():
    prob, temperature = torch.tensor([0.1, 0.5, 0.9]), torch.tensor(2.5)
    grades = grade_temperature_scaled(torch.stack([1 - prob, prob], dim=-1), temperature)
    assert torch.allclose(grades[:, 1], temperature_scaled(prob, temperature), atol=1e-6)
    assert torch.allclose(grades.sum(dim=-1), torch.ones(3))


def test_area_weights_rows_and_no_area_weights_them_alike():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert area_weighted_mean(values, torch.tensor([3, 1])).tolist() == [0.75, 0.25]
    assert area_weighted_mean(values, torch.tensor([0, 0])).tolist() == [0.5, 0.5]
    assert area_weighted_mean(values[:, 0], torch.tensor([3, 1])).item() == 0.75
