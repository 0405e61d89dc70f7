from __future__ import annotations

import torch
from monai.networks.schedulers import DDPMScheduler

from scripts.diffusion import GaussianDiffusion
from scripts.trainer import DiffusionPrepareBatch


def batch(size):
    return {
        "image": torch.randn(size, 4, 4, 4),
        "label": (torch.rand(size, 1, 4, 4) > 0.5).float(),
        "grade": torch.randint(-1, 2, (size,)),
        "subject": [f"s{i}" for i in range(size)],
    }


def test_noises_the_truth_to_the_drawn_timesteps():
    torch.manual_seed(0)
    data = batch(64)
    image, targets, args, kwargs = DiffusionPrepareBatch(GaussianDiffusion(), terminal_fraction=0.0)(data)
    assert args == ()
    assert torch.equal(image, data["image"])
    assert targets["subject"] == data["subject"]
    x_0, t = 2 * data["label"] - 1, kwargs["timesteps"]
    abar = DDPMScheduler(1000, schedule="linear_beta").alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noise = (kwargs["x_t"] - abar.sqrt() * x_0) / (1 - abar).sqrt()
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert torch.equal(targets["timesteps"], t)


def test_terminal_fraction_is_drawn_at_the_last_step():
    torch.manual_seed(0)
    for fraction in (0.0, 0.5, 1.0):
        prepare = DiffusionPrepareBatch(GaussianDiffusion(), terminal_fraction=fraction)
        last = (prepare(batch(2000))[3]["timesteps"] == 999).float().mean().item()
        assert abs(last - fraction) < 0.05


def test_few_train_timesteps():
    timesteps = DiffusionPrepareBatch(GaussianDiffusion(1))(batch(8))[3]["timesteps"]
    assert not timesteps.any()
