"""Samplers, which draw masks from noise. Each method is a class, and all have the same call signature.

``x_0 = sampler(denoise, x_t, pairs, alphas_cumprod, draw)`` with

    denoise         function of x_t ``[B, R, H, W]`` and t that returns the predicted x_0 ``[B, R, H, W]``; each call is
                    one network evaluation
    x_t             noisy masks ``[B, R, H, W]`` at the first timestep
    pairs           (t, t_prev) from :func:`scripts.diffusion.schedule.timestep_pairs`; -1 is the clean mask
    alphas_cumprod  abar_t, ``[T]``
    draw            function that returns new standard normal noise of the shape of x_t

All samplers work on x_0, whatever the network predicts.
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
    """Call signature of the samplers."""

    def __call__(
        self, denoise: Denoise, x_t: torch.Tensor, pairs: Pairs, alphas_cumprod: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        """Return the predicted clean masks ``[B, R, H, W]``."""


class DDIM:
    """Denoising diffusion implicit model, equations 12 and 16 of Song et al. (2021).

    With eta = 1 it is DDPM, the ancestral sampling of Ho et al. (2020), equations 6 and 7: on all T timesteps the
    published method, on fewer the posterior of the shorter chain.

    Args:
        eta: noise that is added at each step, 0 (none) to 1 (as in DDPM).

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
            abar, abar_prev = alphas_cumprod[[t, t_prev]].cpu().double()  # with eta = 1 small differences count
            x_0 = denoise(x_t, t)
            noise = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()  # the noise that x_t and x_0 imply
            sigma = self.eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
            x_t = abar_prev.sqrt() * x_0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * noise
            if self.eta:
                x_t = x_t + sigma * draw()
        return denoise(x_t, pairs[-1][0])


class DiffusersSampler:
    """A deterministic multistep solver of order 2 from ``diffusers``, on the listed timesteps.

    The solver gets abar at the listed timesteps as its whole noise schedule and takes every step of it. It therefore
    visits the same timesteps as the other samplers, also when the first timestep is not T - 1.

    Args:
        scheduler: class name in ``diffusers``.
        options: further arguments of that class.

    Raises:
        InputError: if diffusers is not installed.
    """

    def __init__(self, scheduler: str, **options: str) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise InputError(
                "the samplers dpm_solver and unipc need diffusers: pip install -e '.[solvers]', or set sampler=ddim"
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
        # trained_betas would not do: with few steps of the cosine schedule a beta rounds to 1, which gives NaN
        scheduler.alphas_cumprod = alphas_cumprod[[t for t, _ in reversed(pairs)]].cpu()
        scheduler.set_timesteps(len(pairs))
        for (t, _), step in zip(pairs, scheduler.timesteps, strict=True):
            x_t = scheduler.step(denoise(x_t, t), step, x_t).prev_sample
        return x_t


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ddpm": lambda: DDIM(eta=1.0),
    "ddim": DDIM,
    "dpm_solver": lambda: DiffusersSampler("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++"),
    "unipc": lambda: DiffusersSampler("UniPCMultistepScheduler"),
}


def make_sampler(name: str, eta: float = 0.0) -> Sampler:
    """Create a sampler by name. ``eta`` is an option of ``ddim`` only.

    Raises:
        InputError: for an unknown name, an invalid ``eta``, or if diffusers is needed but not installed.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise InputError(f"sampler '{name}' is not one of {list(SAMPLERS)}")
    if name == "ddim":
        return DDIM(eta)
    if eta:
        raise InputError(f"eta={eta} is an option of sampler=ddim only; set eta=0 for sampler={name}")
    return SAMPLERS[name]()
