from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from scripts.config import InputError
from scripts.diffusion.schedule import LOGITS_PER_X0, GaussianDiffusion, timestep_pairs


@pytest.mark.parametrize(("ours", "monai"), [("linear", "linear_beta"), ("scaled_linear", "scaled_linear_beta")])
def test_thousand_steps_are_the_published_schedule(ours, monai):
    expected = DDPMScheduler(1000, schedule=monai).alphas_cumprod
    assert torch.allclose(GaussianDiffusion(1000, ours).alphas_cumprod, expected, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 20, 250, 1000, 4000])
def test_any_number_of_steps_ends_in_noise(schedule, steps):
    abar = GaussianDiffusion(steps, schedule).alphas_cumprod
    assert len(abar) == steps
    assert abar.isfinite().all()
    assert ((abar > 0) & (abar < 1)).all()
    assert (abar.diff() < 0).all()
    assert abar[-1] < 1e-3


@pytest.mark.parametrize("bad", [{"schedule": "x"}, {"prediction_type": "x"}, {"num_train_timesteps": 0}])
def test_unknown_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        GaussianDiffusion(**bad)


def test_noise_agrees_with_monai():
    x_0, noise, t = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3), torch.tensor([0, 10, 500, 999])
    expected = DDPMScheduler(1000, schedule="linear_beta").add_noise(x_0, noise, t)
    assert torch.allclose(GaussianDiffusion().add_noise(x_0, noise, t), expected, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_mask_back(prediction_type):
    diffusion = GaussianDiffusion(prediction_type=prediction_type)
    x_0, noise, t = torch.sign(torch.randn(4, 1, 3, 3)), torch.randn(4, 1, 3, 3), torch.tensor([0, 10, 500, 900])
    x_t = diffusion.add_noise(x_0, noise, t)
    abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    target = noise if prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * x_0
    logits = diffusion.to_logits(target, x_t, t)
    assert torch.allclose(diffusion.to_x0(logits), x_0, atol=1e-3)
    # and the loss is the mean squared error of the network's output
    error = torch.randn_like(target)
    loss = diffusion.regression_loss(diffusion.to_logits(target + error, x_t, t), x_0, t)
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-2)


def test_sample_prediction_is_a_probability():
    diffusion = GaussianDiffusion()
    logits = torch.tensor([-2.0, 0.0, 3.0])
    assert diffusion.to_logits(logits, None, None) is logits
    assert torch.allclose((diffusion.to_x0(logits) + 1) / 2, logits.sigmoid())
    assert GaussianDiffusion(prediction_type="epsilon").to_x0(torch.tensor(100 * LOGITS_PER_X0)) == 1


def test_pairs_cover_the_schedule_and_agree():
    assert timestep_pairs(1000, 1) == [(999, -1)]
    assert timestep_pairs(1000, 10)[:2] == [(999, 899), (899, 799)]
    assert [t for t, _ in timestep_pairs(7, 7)] == list(range(6, -1, -1))
    for steps in (1, 2, 3, 7, 50, 999, 1000):
        pairs = timestep_pairs(1000, steps)
        assert len(pairs) == steps
        assert [t for _, t in pairs[:-1]] == [t for t, _ in pairs[1:]]
        assert all(t > previous for t, previous in pairs)
    for steps in (0, 1001):
        with pytest.raises(InputError, match="num_inference_steps"):
            timestep_pairs(1000, steps)


def test_pairs_from_a_later_start():
    assert timestep_pairs(1000, 2, start_timestep=499) == [(499, 249), (249, -1)]
    assert timestep_pairs(1000, 1, start_timestep=0) == [(0, -1)]
    for unusable in (1000, -1, "half", 0.5):
        with pytest.raises(InputError, match="start_timestep=.* must be a whole number from 0 to 999"):
            timestep_pairs(1000, 1, start_timestep=unusable)
    with pytest.raises(InputError, match=r"between 1 and 10 \(start_timestep \+ 1\)"):
        timestep_pairs(1000, 11, start_timestep=9)
