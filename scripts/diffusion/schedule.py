"""Gaussian diffusion of masks: noise schedule, forward process and interpretation of the network's output.

Symbols follow Ho et al. (2020, DDPM) and Song et al. (2021, DDIM)::

    x_0         mask scaled to [-1, 1]
    x_t         sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise
    abar_t      alphas_cumprod[t], t = 0 ... T - 1
    noise       standard normal
"""

from __future__ import annotations

import torch
from monai.networks.schedulers.scheduler import NoiseSchedules
from torch import nn

from scripts.config import InputError

SCHEDULES = {"linear": "linear_beta", "scaled_linear": "scaled_linear_beta", "cosine": "cosine"}
PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")
LOGITS_PER_X0 = 4.0  # a mask of x_0 = 1 has the logit 4 (probability 0.98) when x_0 is regressed directly


class GaussianDiffusion(nn.Module):
    """Noise schedule with T steps, and conversion between the network's output, mask logits and x_0.

    MONAI's schedule of 1000 steps is interpolated in log abar to T steps. Any T >= 1 therefore ends in nearly pure
    noise, and T = 1000 is exactly the published schedule. MedSegDiff's published code rescales beta instead, which
    gives beta = 1 and NaN at T = 20.

    Args:
        num_train_timesteps: T, at least 1.
        schedule: ``linear`` (Ho et al. 2020), ``scaled_linear`` (Rombach et al. 2022) or ``cosine`` (Nichol and
            Dhariwal 2021).
        prediction_type: ``sample`` (the network's output is the mask's logits), ``epsilon`` (the noise) or
            ``v_prediction`` (Salimans and Ho 2022, v = sqrt(abar) noise - sqrt(1 - abar) x_0).

    Raises:
        InputError: for an unknown name or T < 1.
    """

    alphas_cumprod: torch.Tensor

    def __init__(
        self, num_train_timesteps: int = 1000, schedule: str = "linear", prediction_type: str = "sample"
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise InputError(f"schedule '{schedule}' is not one of {list(SCHEDULES)}")
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(f"prediction_type '{prediction_type}' is not one of {list(PREDICTION_TYPES)}")
        if num_train_timesteps < 1:
            raise InputError(f"num_train_timesteps={num_train_timesteps} must be at least 1")
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type
        self.register_buffer("alphas_cumprod", _alphas_cumprod(schedule, num_train_timesteps), persistent=False)

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Sample x_t ``[B, R, H, W]`` of q(x_t | x_0) from x_0 and noise ``[B, R, H, W]`` and timesteps ``[B]``."""
        abar = self._abar(timesteps, x_0)
        return abar.sqrt() * x_0 + (1 - abar).sqrt() * noise

    def to_logits(self, output: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mask logits ``[B, R, H, W]`` from the network's raw output.

        For ``epsilon`` and ``v_prediction``, the logits are 4 times the x_0 that the output implies.
        """
        if self.prediction_type == "sample":
            return output
        abar = self._abar(timesteps, x_t)
        if self.prediction_type == "epsilon":
            x_0 = (x_t - (1 - abar).sqrt() * output) / abar.sqrt()
        else:
            x_0 = abar.sqrt() * x_t - (1 - abar).sqrt() * output
        return LOGITS_PER_X0 * x_0

    def to_x0(self, logits: torch.Tensor) -> torch.Tensor:
        """x_0 in [-1, 1] from mask logits: 2 sigmoid(logits) - 1 for ``sample``, else logits / 4, clipped."""
        if self.prediction_type == "sample":
            return torch.tanh(logits / 2)
        return (logits / LOGITS_PER_X0).clamp(-1, 1)

    def regression_loss(self, logits: torch.Tensor, x_0: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the predicted noise or v, written as a weighted error of x_0.

        |noise error|^2 = abar / (1 - abar) |x_0 error|^2 and |v error|^2 = 1 / (1 - abar) |x_0 error|^2 (Salimans
        and Ho 2022, appendix D). Not used for ``sample``, which is trained with a mask loss.
        """
        abar = self._abar(timesteps, x_0)
        weight = (abar if self.prediction_type == "epsilon" else 1.0) / (1 - abar)
        return (weight * (logits / LOGITS_PER_X0 - x_0).square()).mean()

    def _abar(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        abar = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
        return abar.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _alphas_cumprod(schedule: str, num_train_timesteps: int) -> torch.Tensor:
    base = NoiseSchedules[SCHEDULES[schedule]](1000)
    betas = base[0] if isinstance(base, tuple) else base
    log_abar = torch.log1p(-betas.double().clamp(max=0.999)).cumsum(0)
    # step i lies at position (i + 1) * 1000 / T - 1 of the 1000 steps, so that both end alike; abar = 1 at position -1
    position = (torch.arange(num_train_timesteps, dtype=torch.double) + 1) * 1000 / num_train_timesteps - 1
    from_minus_one = torch.cat([torch.zeros(1, dtype=torch.double), log_abar])
    low = position.floor().long().clamp(max=998)
    share = position - low
    return ((1 - share) * from_minus_one[low + 1] + share * from_minus_one[low + 2]).exp().float()


def timestep_pairs(
    num_train_timesteps: int, num_inference_steps: int, start_timestep: int | None = None
) -> list[tuple[int, int]]:
    """Pairs (t, t_prev) of a trajectory from T - 1 down to the clean mask, which is written as t_prev = -1.

    The t_prev of each pair is the t of the next pair, so that a step always ends at the next timestep (in MONAI's DDIM
    it does not). The spacing is 'trailing' (Lin et al. 2024): any number of steps starts at T - 1, where x_t is noise,
    or at ``start_timestep``.

    Raises:
        InputError: unless 0 <= start_timestep < T and 1 <= num_inference_steps <= start_timestep + 1.
    """
    start = num_train_timesteps - 1 if start_timestep is None else start_timestep
    if not isinstance(start, int) or not 0 <= start < num_train_timesteps:
        raise InputError(f"start_timestep={start!r} must be a whole number from 0 to {num_train_timesteps - 1}")
    if not 1 <= num_inference_steps <= start + 1:
        key = "num_train_timesteps" if start_timestep is None else "start_timestep + 1"
        raise InputError(f"num_inference_steps={num_inference_steps} must lie between 1 and {start + 1} ({key})")
    stride = (start + 1) / num_inference_steps
    steps = [round(start + 1 - i * stride) - 1 for i in range(num_inference_steps)]
    return list(zip(steps, [*steps[1:], -1], strict=True))
