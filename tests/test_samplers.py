from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from scripts.config import InputError
from scripts.diffusion.samplers import DDIM, SAMPLERS, make_sampler
from scripts.diffusion.schedule import GaussianDiffusion, timestep_pairs

MU, S = 0.7, 0.5
NAMES = [name for name in SAMPLERS if importlib.util.find_spec("diffusers") or name in ("ddpm", "ddim")]


def gain_of_posterior_mean(abar):
    """E[x_0 | x_t] = mu + k (x_t - sqrt(abar) mu) for x_0 ~ N(mu, s^2)."""
    return math.sqrt(abar) * S**2 / (abar * S**2 + 1 - abar)


def sample_gaussian(sampler, diffusion, pairs, seed=0, num=200_000):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(num, 1, generator=generator)

    def denoise(x_t, t):
        abar = diffusion.alphas_cumprod[t].item()
        return MU + gain_of_posterior_mean(abar) * (x_t - math.sqrt(abar) * MU)

    return sampler(denoise, draw(), pairs, diffusion.alphas_cumprod, draw)


ALL_ETAS = [(DDIM(), 0), (DDIM(0.5), 0.5), (DDIM(1), 1), (make_sampler("ddpm"), 1)]


@pytest.mark.parametrize("steps", [2, 5, 50, 1000])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(("sampler", "eta"), ALL_ETAS)
def test_a_known_x_0_keeps_the_marginals(steps, schedule, sampler, eta):
    """Lemma 1 of Song et al. (2021): if x_0 is known, x_t is N(sqrt(abar_t) x_0, 1 - abar_t) at every step."""
    diffusion, pairs, num = GaussianDiffusion(1000, schedule), timestep_pairs(1000, steps), 20_000
    generator, moments = torch.Generator().manual_seed(0), {}

    def draw():
        return torch.randn(num, 1, generator=generator)

    def denoise(x_t, t):
        moments[t] = x_t.mean().item(), x_t.std().item()
        return torch.full_like(x_t, MU)

    abar = diffusion.alphas_cumprod
    sampler(denoise, abar[pairs[0][0]].sqrt() * MU + (1 - abar[pairs[0][0]]).sqrt() * draw(), pairs, abar, draw)
    assert list(moments) == [t for t, _ in pairs]
    for t, (mean, deviation) in moments.items():
        assert mean == pytest.approx(abar[t].sqrt().item() * MU, abs=0.04)
        assert deviation == pytest.approx((1 - abar[t]).sqrt().item(), abs=0.03)


@pytest.mark.parametrize(("sampler", "eta"), ALL_ETAS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_a_gaussian_in_one_and_in_all_steps(schedule, sampler, eta):
    """One step gives the posterior mean, which spreads less than the data. 1000 steps give their distribution."""
    diffusion = GaussianDiffusion(1000, schedule)
    abar = diffusion.alphas_cumprod[-1].item()
    gain = gain_of_posterior_mean(abar)
    x = sample_gaussian(sampler, diffusion, timestep_pairs(1000, 1))
    assert x.mean().item() == pytest.approx(MU - gain * math.sqrt(abar) * MU, abs=0.005)
    assert x.std().item() == pytest.approx(gain, abs=0.005)
    x = sample_gaussian(sampler, diffusion, timestep_pairs(1000, 1000), num=20_000)
    assert x.mean().item() == pytest.approx(MU, abs=0.03)
    assert x.std().item() == pytest.approx(S, abs=0.015)


def flow(denoise, x_t, pairs, alphas_cumprod, draw):
    """DDIM as published: equation 13 of Song et al. (2021), a step of an ordinary differential equation."""
    for t, t_prev in pairs[:-1]:
        abar, prev = alphas_cumprod[[t, t_prev]].double()
        noise = (x_t - abar.sqrt() * denoise(x_t, t)) / (1 - abar).sqrt()
        step = ((1 - prev) / prev).sqrt() - ((1 - abar) / abar).sqrt()
        x_t = prev.sqrt() * (x_t / abar.sqrt() + step * noise)
    return denoise(x_t, pairs[-1][0])


@pytest.mark.parametrize("steps", [2, 20, 1000])
def test_ddim_is_the_published_flow(steps):
    diffusion, pairs = GaussianDiffusion(), timestep_pairs(1000, steps)
    ours = sample_gaussian(DDIM(), diffusion, pairs, num=1000)
    assert torch.allclose(ours.double(), sample_gaussian(flow, diffusion, pairs, num=1000).double(), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_steps", [1, 2, 20, 1000])
def test_every_sampler_finds_the_gaussian_at_any_number_of_train_timesteps(name, train_steps):
    diffusion = GaussianDiffusion(train_steps)
    steps = min(train_steps, 50)
    x = sample_gaussian(make_sampler(name), diffusion, timestep_pairs(train_steps, steps))
    assert x.isfinite().all()
    assert x.mean().item() == pytest.approx(MU, abs=0.03)


def ancestral(denoise, x_t, pairs, alphas_cumprod, draw):
    """Ancestral sampling as published: equations 6 and 7 of Ho et al. (2020), for the chain of the listed timesteps."""
    for t, t_prev in pairs[:-1]:
        abar, abar_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
        alpha = abar / abar_prev
        mean = abar_prev.sqrt() * (1 - alpha) * denoise(x_t, t) + alpha.sqrt() * (1 - abar_prev) * x_t
        variance = (1 - abar_prev) / (1 - abar) * (1 - alpha)
        x_t = mean / (1 - abar) + variance.sqrt() * draw()
    return denoise(x_t, pairs[-1][0])


@pytest.mark.parametrize("steps", [20, 1000])
def test_ddpm_is_the_published_ancestral_sampling(steps):
    diffusion, pairs = GaussianDiffusion(), timestep_pairs(1000, steps)
    ours = sample_gaussian(make_sampler("ddpm"), diffusion, pairs, num=1000)
    assert torch.allclose(ours, sample_gaussian(ancestral, diffusion, pairs, num=1000), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("dpm_solver", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("unipc", "UniPCMultistepScheduler", {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_solvers_equal_diffusers_used_directly(name, scheduler, options, steps, schedule):
    diffusers = pytest.importorskip("diffusers")
    # diffusers has the same schedules: `linear` (Ho et al. 2020) and `scaled_linear` (Rombach et al. 2022)
    start, end = (1e-4, 2e-2) if schedule == "linear" else (8.5e-4, 1.2e-2)
    ours = GaussianDiffusion(1000, schedule)
    abar = ours.alphas_cumprod.double()
    betas = (1 - abar / torch.cat([torch.ones(1), abar[:-1]])).tolist()
    theirs = getattr(diffusers, scheduler)(
        trained_betas=betas,
        prediction_type="sample",
        timestep_spacing="trailing",
        **options,
    )
    published = getattr(diffusers, scheduler)(beta_schedule=schedule, beta_start=start, beta_end=end)
    if schedule == "linear":
        assert torch.allclose(published.alphas_cumprod, ours.alphas_cumprod, rtol=1e-3)
    theirs.set_timesteps(steps)
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))

    def denoise(x_t, t):
        return torch.tanh(x_t + t / 1000)  # nonlinear, with values in [-1, 1] like masks

    expected = x
    for t in theirs.timesteps:
        expected = theirs.step(denoise(expected, int(t)), t, expected).prev_sample
    result = make_sampler(name)(denoise, x, timestep_pairs(1000, steps), ours.alphas_cumprod, lambda: None)
    assert torch.allclose(result, expected, atol=1e-5)


def test_multistep_solvers_need_fewer_steps_than_ddim():
    """With ten steps, the standard deviation is closer to that of the Gaussian than with DDIM."""
    pytest.importorskip("diffusers")
    diffusion, pairs = GaussianDiffusion(1000, "cosine"), timestep_pairs(1000, 10)
    errors = {name: abs(sample_gaussian(make_sampler(name), diffusion, pairs).std().item() - S) for name in SAMPLERS}
    assert errors["dpm_solver"] < errors["ddim"]
    assert errors["unipc"] < errors["ddim"]


@pytest.mark.parametrize("name", NAMES)
def test_one_evaluation_per_step_at_the_listed_timesteps(name):
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        return torch.zeros_like(x_t)

    pairs, abar = timestep_pairs(1000, 7, start_timestep=499), GaussianDiffusion().alphas_cumprod
    result = make_sampler(name)(denoise, torch.randn(5, 1), pairs, abar, lambda: torch.zeros(5, 1))
    assert seen == [t for t, _ in pairs]
    assert seen[0] == 499
    assert torch.allclose(result, torch.zeros(5, 1), atol=1e-6)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("dpm_solver", "unipc"):
        with pytest.raises(InputError, match=r"pip install -e '.\[solvers\]'"):
            make_sampler(name)
    assert isinstance(make_sampler("ddim"), DDIM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("ddmp", 0.0), "sampler 'ddmp'"),
        (("ddim", 1.5), "eta=1.5"),
        (("ddim", -0.1), "eta=-0.1"),
        (("ddpm", 0.5), "eta=0.5 is an option of sampler=ddim"),
    ],
)
def test_unusable_settings(settings, message):
    with pytest.raises(InputError, match=message):
        make_sampler(*settings)


def test_ddpm_moments_agree_with_numpy_for_a_single_step():
    """Equation 7 of Ho et al. (2020) computed by hand for the step from t = 1 to t = 0, with T = 2."""
    diffusion = GaussianDiffusion(2)
    abar = diffusion.alphas_cumprod.double().numpy()
    beta = 1 - abar[1] / abar[0]
    mean = (np.sqrt(abar[0]) * beta * 0.3 + np.sqrt(1 - beta) * (1 - abar[0]) * 1.1) / (1 - abar[1])
    seen = []

    def denoise(x_t, t):
        seen.append(x_t.item())
        return torch.tensor([0.3])

    sampler = make_sampler("ddpm")
    sampler(denoise, torch.tensor([1.1]), [(1, 0), (0, -1)], diffusion.alphas_cumprod, lambda: torch.zeros(1))
    assert seen[1] == pytest.approx(mean, abs=1e-6)
