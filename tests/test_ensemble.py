from __future__ import annotations

import pytest
import torch

from scripts.sampling.ensemble import fuse, pairwise_dice, staple


def test_mean_and_majority():
    samples = torch.tensor([0.9, 0.6, 0.4]).reshape(3, 1, 1, 1, 1).expand(3, 2, 2, 2, 2)
    assert torch.allclose(fuse(samples, "mean"), torch.full((2, 2, 2, 2), 1.9 / 3))
    assert torch.allclose(fuse(samples, "majority"), torch.full((2, 2, 2, 2), 2 / 3))


def test_staple_recovers_planted_performance():
    """Warfield et al. 2004, section III: raters with known sensitivity and specificity segment one true mask."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(32, 32, 16, dtype=torch.bool)
    truth[8:24, 8:26, 3:13] = True
    planted = [(0.99, 0.98), (0.97, 0.99), (0.7, 0.8), (0.65, 0.85), (0.75, 0.7)]
    raters = []
    for sensitivity, specificity in planted:
        chance = torch.rand(truth.shape, generator=generator)
        raters.append(torch.where(truth, chance < sensitivity, chance > specificity))
    prob, sensitivities, specificities = staple(torch.stack(raters))
    for (p, q), p_found, q_found in zip(planted, sensitivities, specificities, strict=True):
        assert p_found == pytest.approx(p, abs=0.02)
        assert q_found == pytest.approx(q, abs=0.02)
    agreed = ((prob > 0.5) == truth).float().mean()
    majority = ((torch.stack(raters).float().mean(dim=0) > 0.5) == truth).float().mean()
    assert agreed > majority  # better raters have more weight


def test_staple_keeps_the_axes():
    masks = torch.zeros(3, 8, 6, 4, dtype=torch.bool)
    masks[:, 1:7, 2:4, 1] = True
    masks[0, 0, 0, 0] = True
    prob, _, _ = staple(masks)
    assert prob.shape == (8, 6, 4)
    assert torch.equal(prob > 0.5, masks[1])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_samples_that_agree_are_the_truth(value):
    samples = torch.full((3, 2, 4, 4, 2), value)
    assert torch.equal(fuse(samples, "staple"), samples[0])
    one = torch.rand(1, 1, 4, 4, 2)
    assert torch.equal(fuse(one, "staple"), (one[0] > 0.5).float())


def test_pairwise_dice():
    samples = torch.zeros(3, 2, 4, 4, 1)
    samples[0, 0, :2] = 1  # 8 voxels
    samples[1, 0, :2] = 1
    samples[2, 0, 1:3] = 1  # half of these voxels in common with the others
    dice = pairwise_dice(samples)
    assert dice[0].item() == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert dice[1].item() == 1  # all samples are empty
    assert pairwise_dice(samples[:1]).isnan().all()
