"""Samplers: how masks are drawn from noise. One method a class, one signature.

``x_0 = sampler(denoise, x_t, pairs, alphas_cumprod, draw)`` with

    denoise         x_t ``[B, R, H, W]`` and t to the predicted x_0 ``[B, R, H, W]``: one network evaluation
    x_t             noisy masks at the first timestep
    pairs           (t, t_prev) from :func:`scripts.diffusion.schedule.timestep_pairs`; -1 is the clean mask
    alphas_cumprod  abar_t, ``[T]``
    draw            fresh standard normal noise like x_t, for the methods that add noise

All work on x_0, whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from scripts.config import InputError

Denoise = Callable[[torch.Tensor, int], torch.Tensor]
Pairs = Sequence[tuple[int, int]]
Draw = Callable[[], torch.Tensor]


class Sampler(Protocol):
    """What every sampler is."""

    def __call__(
        self, denoise: Denoise, x_t: torch.Tensor, pairs: Pairs, alphas_cumprod: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        """Predicted clean masks ``[B, R, H, W]``."""


class DDPM:
    """Ancestral sampling, equations 6 and 7 of Ho et al. (2020), on the listed timesteps.

    With all T of them it is the published method; on fewer, the same posterior q(x_s | x_t, x_0) of the thinned chain,
    whose step from s to t has alpha_t = abar_t / abar_s.
    """

    def __call__(
        self, denoise: Denoise, x_t: torch.Tensor, pairs: Pairs, alphas_cumprod: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        for t, t_prev in pairs[:-1]:
            abar, abar_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
            alpha = abar / abar_prev
            beta = 1 - alpha
            x_0 = denoise(x_t, t)
            mean = (abar_prev.sqrt() * beta * x_0 + alpha.sqrt() * (1 - abar_prev) * x_t) / (1 - abar)
            beta_tilde = (1 - abar_prev) / (1 - abar) * beta
            x_t = mean + beta_tilde.sqrt() * draw()
        return denoise(x_t, pairs[-1][0])  # the posterior at t = 0 is x_0 itself


class DDIM:
    """Equations 12 and 16 of Song et al. (2021).

    Args:
        eta: 0 is deterministic, 1 adds as much noise as DDPM.

    Raises:
        InputError: unless 0 <= eta <= 1.
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"eta={eta} must lie between 0 and 1")
        self.eta = eta

    def __call__(
        self, denoise: Denoise, x_t: torch.Tensor, pairs: Pairs, alphas_cumprod: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        for t, t_prev in pairs[:-1]:
            abar, abar_prev = alphas_cumprod[t], alphas_cumprod[t_prev]
            x_0 = denoise(x_t, t)
            noise = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()  # what x_t and x_0 imply
            sigma = self.eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
            x_t = abar_prev.sqrt() * x_0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * noise
            if self.eta:
                x_t = x_t + sigma * draw()
        return denoise(x_t, pairs[-1][0])


class DiffusersSampler:
    """A deterministic multistep solver of ``diffusers``, of order 2, on the listed timesteps.

    The solver is handed the thinned schedule itself, abar at the listed timesteps, and takes every step of it; so all
    solvers go through the same timesteps, from any first one.

    Args:
        scheduler: class name in ``diffusers``.
        options: further arguments of that class.

    Raises:
        InputError: when diffusers is not installed.
    """

    def __init__(self, scheduler: str, **options: str) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise InputError(
                "the samplers dpm_solver and unipc need diffusers: pip install 'medsegdiff-bundle[solvers]', "
                "or set sampler=ddim"
            ) from error
        self.scheduler = getattr(diffusers, scheduler)
        self.options = options

    def __call__(
        self, denoise: Denoise, x_t: torch.Tensor, pairs: Pairs, alphas_cumprod: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        scheduler = self.scheduler(
            num_train_timesteps=len(pairs),
            prediction_type="sample",
            solver_order=2,
            timestep_spacing="trailing",
            **self.options,
        )
        # not as trained_betas: a step of the thinned cosine schedule would round to beta = 1 and give NaN
        scheduler.alphas_cumprod = alphas_cumprod[[t for t, _ in reversed(pairs)]].cpu()
        scheduler.set_timesteps(len(pairs))
        for (t, _), step in zip(pairs, scheduler.timesteps, strict=True):
            x_t = scheduler.step(denoise(x_t, t), step, x_t).prev_sample
        return x_t


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver": lambda: DiffusersSampler("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++"),
    "unipc": lambda: DiffusersSampler("UniPCMultistepScheduler"),
}


def make_sampler(name: str, eta: float = 0.0) -> Sampler:
    """Sampler by name; ``eta`` belongs to ``ddim``.

    Raises:
        InputError: for an unknown name, an eta that the sampler does not have, or a missing extra.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler '{name}' is not one of {list(SAMPLERS)}")
    if name == "ddim":
        return DDIM(eta)
    if eta:
        raise InputError(f"eta={eta} is for sampler=ddim; {name} has none")
    return SAMPLERS[name]()
