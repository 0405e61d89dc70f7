"""What a training step feeds the network: a noised truth at a random timestep."""

from __future__ import annotations

import torch
from monai.engines import PrepareBatch

from scripts.diffusion import GaussianDiffusion


class DiffusionPrepareBatch(PrepareBatch):
    """Draw timesteps and noise, and turn labels into noisy masks.

    Args:
        diffusion: the noise schedule.
        terminal_fraction: share of a batch trained at T - 1, where sampling starts and where the mask has to come
            from the image alone; the other timesteps are uniform.
    """

    def __init__(self, diffusion: GaussianDiffusion, terminal_fraction: float = 0.5) -> None:
        self.diffusion = diffusion
        self.terminal_fraction = terminal_fraction

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, torch.Tensor]]:
        """Return ``image [B, M, H, W]``, targets of :class:`~scripts.losses.MultiTaskLoss`, and ``x_t, timesteps``."""
        image, label, grade = (
            torch.as_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)
            for key in ("image", "label", "grade")
        )
        steps = self.diffusion.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(image),), device=image.device)
        timesteps[torch.rand(len(image), device=image.device) < self.terminal_fraction] = steps - 1
        x_t = self.diffusion.add_noise(2 * label - 1, torch.randn_like(label), timesteps)
        targets = {"label": label, "grade": grade, "timesteps": timesteps, "subject": batchdata["subject"]}
        return image, targets, (), {"x_t": x_t, "timesteps": timesteps}
