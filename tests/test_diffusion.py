from __future__ import annotations

import math

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from scripts.config import InputError
from scripts.diffusion import LOGITS_PER_X0, GaussianDiffusion, ddim_step, timestep_pairs


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
    # and the loss is the mean squared error of what is predicted
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


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_sampling_a_gaussian_gives_the_moments_derived_on_paper(steps, schedule):
    """x_0 ~ N(mu, s^2) has the exact denoiser E[x_0 | x_t] = mu + k_t (x_t - sqrt(abar_t) mu).

    With k_t = sqrt(abar) s^2 / (abar s^2 + 1 - abar), a DDIM step maps the deviation d_t = x_t - sqrt(abar_t) mu to
    d_prev = [sqrt(abar_prev) k_t + sqrt(1 - abar_prev) (1 - sqrt(abar) k_t) / sqrt(1 - abar)] d_t, starting from
    d_T ~ N(-sqrt(abar_T) mu, 1): the mean and the standard deviation follow in closed form.
    """
    mu, s = 0.7, 0.5
    diffusion = GaussianDiffusion(1000, schedule)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    gain = 1.0
    for t, t_prev in timestep_pairs(1000, steps):
        abar = diffusion.alphas_cumprod[t].item()
        k = math.sqrt(abar) * s**2 / (abar * s**2 + 1 - abar)
        x = ddim_step(diffusion, x, mu + k * (x - math.sqrt(abar) * mu), t, t_prev)
        previous = diffusion.alphas_cumprod[t_prev].item() if t_prev >= 0 else 1.0
        gain *= math.sqrt(previous) * k + math.sqrt(1 - previous) * (1 - math.sqrt(abar) * k) / math.sqrt(1 - abar)
    start = math.sqrt(diffusion.alphas_cumprod[-1].item()) * mu
    assert x.mean().item() == pytest.approx(mu - gain * start, abs=0.01)
    assert x.std().item() == pytest.approx(gain, abs=0.01)
    if steps == 1000:
        assert x.std().item() == pytest.approx(s, abs=0.01)
