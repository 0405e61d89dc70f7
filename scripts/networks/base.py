"""What training and sampling expect of every network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.networks.calibration import Calibration
from scripts.networks.measurements import num_measurements

Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # seg_logits, cls_logits, calib_map


class SegmentationNetwork(nn.Module):
    """Base class: attributes, calibration, and the two calls of training and sampling.

    Args:
        diffusion: noise schedule and prediction type.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        num_grades: K, number of grades.
        divisor: the sides of a slice must be multiples of it.

    Attributes:
        self_conditioning: whether ``forward`` uses ``estimate``.
        noised_mask: what training noises by default, see :class:`scripts.training.steps.DenoisingInferer`.
        has_calib_map: whether there is an image-only branch.
        is_stochastic: whether masks can be drawn from that branch.
        calibration: what is fitted after training.
    """

    noised_mask: str = "truth"
    self_conditioning: bool = False
    has_calib_map: bool = False
    is_stochastic: bool = False
    cls_head: nn.Module | None

    def __init__(
        self, diffusion: GaussianDiffusion, in_channels: int, out_channels: int, num_grades: int, divisor: int
    ) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.out_channels = out_channels
        self.divisor = divisor
        self.calibration = Calibration(out_channels, num_grades, num_measurements(out_channels, in_channels))

    def check_image_size(self, size: Sequence[int]) -> None:
        """Raise InputError unless both sides of a slice ``(H, W)`` are multiples of :attr:`divisor`."""
        if any(side % self.divisor for side in size):
            raise InputError(
                f"image_size {tuple(size)} must be divisible by {self.divisor}: 2 per down-sampling, "
                "times denoiser_stride"
            )

    def condition(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything that depends on the image ``[B, M, H, W]`` alone, by name; computed once per slice.

        Every tensor has B first. ``calib_map`` holds the logits of the calibration map ``[B, R, H, W]``. A stochastic
        network adds the distribution that masks are drawn from (:class:`~scripts.networks.stochastic.StochasticUNet`)
        and ``first_mask``, logits ``[B, R, H, W]``.
        """
        self.check_image_size(image.shape[2:])
        return {}

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: dict[str, torch.Tensor] | None = None,
        estimate: torch.Tensor | None = None,
    ) -> Outputs | torch.Tensor:
        """Predict clean mask and grade from image and noisy mask.

        Args:
            image: slices ``[B, M, H, W]``, z-scored.
            x_t: noisy masks ``[B, R, H, W]``.
            timesteps: ``[B]``, 0 to T - 1.
            condition: result of :meth:`condition` for ``image``; sampling computes it once.
            estimate: x_0 ``[B, R, H, W]`` of the step before, for self-conditioning; None means 0.

        Returns:
            ``(seg_logits [B, R, H, W], cls_logits [B, K] or None, calib_map [B, R, H, W] or None)`` for K grades.
            With the image alone, as MONAI's export and verification call it, only the ``seg_logits`` of one
            evaluation from x_t = 0 at T - 1.
        """
        raise NotImplementedError
