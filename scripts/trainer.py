"""What a training step feeds the network: a noised mask at a random timestep."""

from __future__ import annotations

import torch
from monai.engines import PrepareBatch
from monai.inferers import Inferer

from scripts.config import InputError
from scripts.net import MedSegDiff, PlainUNet
from scripts.timesteps import TimestepSampler

NOISED_MASKS = ("truth", "prediction", "calibration")


class DiffusionPrepareBatch(PrepareBatch):
    """Draw timesteps and noise for a batch.

    Args:
        timestep_sampler: how timesteps are drawn.
    """

    def __init__(self, timestep_sampler: TimestepSampler) -> None:
        self.timestep_sampler = timestep_sampler

    def __call__(  # type: ignore[override]
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, torch.Tensor]]:
        """Return ``image [B, M, H, W]``, targets of :class:`~scripts.losses.MultiTaskLoss`, and what is noised how."""
        image, label, grade = (
            torch.as_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)
            for key in ("image", "label", "grade")
        )
        timesteps = self.timestep_sampler(len(image)).to(image.device)
        targets = {"label": label, "grade": grade, "timesteps": timesteps, "subject": batchdata["subject"]}
        return image, targets, (), {"label": label, "noise": torch.randn_like(label), "timesteps": timesteps}


class DenoisingInferer(Inferer):
    """Forward pass of training: noise a mask, denoise it.

    With ``truth`` noised, the network learns to trust a mask it will never see: sampling noises its own. So one may
    noise, without gradients, what it would see there: its ``prediction`` from pure noise (recycling, Fu et al.,
    MELBA 2023; one more denoiser evaluation a step), or the ``calibration`` map, which is computed anyway.

    A network with self-conditioning (Chen et al. 2023, Analog Bits) sees its own estimate of x_0 from the same x_t
    in half of the slices, nothing in the others.

    Args:
        noised_mask: one of :data:`NOISED_MASKS`.

    Raises:
        InputError: for an unknown ``noised_mask``.
    """

    def __init__(self, noised_mask: str = "truth") -> None:
        super().__init__()
        if noised_mask not in NOISED_MASKS:
            raise InputError(f"noised_mask '{noised_mask}' is not one of {list(NOISED_MASKS)}")
        self.noised_mask = noised_mask

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: MedSegDiff | PlainUNet,
        label: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Outputs of the network for ``inputs [B, M, H, W]``, ``label, noise [B, R, H, W]`` and ``timesteps [B]``."""
        calib_map = network.calibrate(inputs)

        @torch.no_grad()
        def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return network.diffusion.to_x0(network(inputs, x_t, t, calib_map)[0].float())

        if self.noised_mask == "truth" or calib_map is None:
            x_0 = 2 * label - 1
        elif self.noised_mask == "prediction":
            x_0 = predict(
                torch.randn_like(noise), torch.full_like(timesteps, network.diffusion.num_train_timesteps - 1)
            )
        else:
            x_0 = torch.tanh(calib_map.detach().float() / 2)
        x_t = network.diffusion.add_noise(x_0, noise, timesteps)
        estimate = None
        if network.self_conditioning:
            half = torch.rand(len(inputs), 1, 1, 1, device=inputs.device) < 0.5
            estimate = predict(x_t, timesteps) * half
        return network(inputs, x_t, timesteps, calib_map, estimate)
