"""Baselines without diffusion. They have the interface of the diffusion network, so that everything else is equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import DenseNet121, resnet18
from torch import nn

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.networks.base import Outputs, SegmentationNetwork
from scripts.networks.grading import GradingHead
from scripts.networks.unets import ImageUNet
from scripts.networks.variants import check_channels

EMPTY_LOGIT = -10.0  # mask logit where nothing is predicted


class Baseline(SegmentationNetwork):
    """A network whose single evaluation ignores the noisy mask. See :class:`SegmentationNetwork` for the arguments.

    Raises:
        InputError: for a ``prediction_type`` other than ``sample``.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, in_channels: int, out_channels: int, num_grades: int, divisor: int
    ) -> None:
        super().__init__(diffusion, in_channels, out_channels, num_grades, divisor)
        if diffusion.prediction_type != "sample":
            raise InputError("the baselines predict masks: leave prediction_type at 'sample'")

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``seg_logits [B, R, H, W]`` and ``cls_logits [B, K]`` (or None) of ``image [B, M, H, W]``."""
        raise NotImplementedError

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: dict[str, torch.Tensor] | None = None,
        estimate: torch.Tensor | None = None,
    ) -> Outputs | torch.Tensor:
        """See :meth:`SegmentationNetwork.forward`; there is no calibration map."""
        self.check_image_size(image.shape[2:])
        seg_logits, cls_logits = self.predict(image)
        return seg_logits if x_t is None else (seg_logits, cls_logits, None)


class PlainUNet(Baseline):
    """A plain MONAI U-Net with the same grading head on its bottleneck.

    Args:
        diffusion: see :class:`Baseline`.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        num_grades: K, number of grades.
        calib_channels: channels of its levels.
        use_cls_head: grade from its bottleneck.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        in_channels: int = 4,
        out_channels: int = 1,
        num_grades: int = 2,
        calib_channels: Sequence[int] | None = None,
        use_cls_head: bool = True,
    ) -> None:
        channels = check_channels("calib_channels", calib_channels or (32, 64, 128, 256))
        super().__init__(diffusion, in_channels, out_channels, num_grades, 2 ** (len(channels) - 1))
        self.unet = ImageUNet(in_channels, out_channels, channels)
        self.cls_head = GradingHead(channels[-1], num_grades) if use_cls_head else None

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Baseline.predict`."""
        seg_logits, features, _ = self.unet(image)
        return seg_logits, self.cls_head(features[-1]) if self.cls_head is not None else None


class GradingNetwork(Baseline):
    """A classifier that grades slices and segments nothing: for ``loss::tasks: [grading]``.

    Its masks are empty, so a subject's grade is the plain mean over its slices.

    Args:
        diffusion: see :class:`Baseline`.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions, all of them empty.
        num_grades: K, number of grades.

    Attributes:
        least: smallest side of a slice (pixels).
    """

    least = 1

    def __init__(
        self, diffusion: GaussianDiffusion, in_channels: int = 4, out_channels: int = 1, num_grades: int = 2
    ) -> None:
        super().__init__(diffusion, in_channels, out_channels, num_grades, divisor=max(1, self.least // 2))
        self.cls_head = self.classifier(in_channels, num_grades)

    def check_image_size(self, size: Sequence[int]) -> None:
        """Also raise InputError if a side is too small for the classifier."""
        super().check_image_size(size)
        if min(size) < self.least:
            raise InputError(f"image_size {tuple(size)} is too small for {type(self).__name__}: {self.least} or more")

    def classifier(self, in_channels: int, num_grades: int) -> nn.Module:
        """A network from slices ``[B, M, H, W]`` to grade logits ``[B, K]``."""
        raise NotImplementedError

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Baseline.predict`."""
        assert self.cls_head is not None
        empty = image.new_full((image.shape[0], self.out_channels, *image.shape[2:]), EMPTY_LOGIT)
        return empty, self.cls_head(image)


class GradingResNet(GradingNetwork):
    """MONAI's ResNet-18."""

    def classifier(self, in_channels: int, num_grades: int) -> nn.Module:
        """See :meth:`GradingNetwork.classifier`."""
        return resnet18(spatial_dims=2, n_input_channels=in_channels, num_classes=num_grades)


class GradingDenseNet(GradingNetwork):
    """MONAI's DenseNet-121. It halves slices five times, and needs two pixels for its last batch norm."""

    least = 64

    def classifier(self, in_channels: int, num_grades: int) -> nn.Module:
        """See :meth:`GradingNetwork.classifier`."""
        return DenseNet121(spatial_dims=2, in_channels=in_channels, out_channels=num_grades)
