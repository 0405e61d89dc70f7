"""The honest baselines, with the signature of the diffusion network, so that all else is equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import resnet18
from torch import nn

from scripts.config import InputError
from scripts.diffusion import GaussianDiffusion
from scripts.net import GradingHead, ImageUNet, check_image_size, register_temperatures
from scripts.variants import check_channels

NO_TUMOUR = -10.0  # logit of a mask that nothing predicts


class Baseline(nn.Module):
    """What sampling and training ask of a network whose one evaluation needs no noisy mask.

    Args:
        diffusion: ignored but for ``prediction_type``, which must be ``sample``.
        out_channels: R, number of target regions.
        divisor: of the sides of a slice.

    Raises:
        InputError: for another ``prediction_type``.
    """

    brain_temperature: torch.Tensor
    lesion_temperature: torch.Tensor
    grade_temperature: torch.Tensor
    noised_mask = "truth"
    self_conditioning = False
    has_calib_map = False

    def __init__(self, diffusion: GaussianDiffusion, out_channels: int, divisor: int) -> None:
        super().__init__()
        if diffusion.prediction_type != "sample":
            raise InputError("the baselines predict masks: leave prediction_type at 'sample'")
        self.diffusion = diffusion
        self.out_channels = out_channels
        self.divisor = divisor
        register_temperatures(self, out_channels)

    def condition(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing to compute ahead: the one evaluation is the whole network."""
        check_image_size(image.shape[2:], self.divisor)
        return {}

    @property
    def bottleneck(self) -> nn.Module:
        """Where the tasks part: its output feeds the grading head and the decoder."""
        raise NotImplementedError

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``seg_logits [B, R, H, W]`` and ``cls_logits [B, 2]`` or None of ``image [B, M, H, W]``."""
        raise NotImplementedError

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: dict[str, torch.Tensor] | None = None,
        estimate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None] | torch.Tensor:
        """See :meth:`scripts.net.MedSegDiff.forward`; there is no calibration map."""
        check_image_size(image.shape[2:], self.divisor)
        seg_logits, cls_logits = self.predict(image)
        return seg_logits if x_t is None else (seg_logits, cls_logits, None)


class PlainUNet(Baseline):
    """A plain MONAI U-Net, with the same grading head on its bottleneck.

    Args:
        diffusion: see :class:`Baseline`.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        channels: channels of its levels.
        use_cls_head: grade from its bottleneck.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        in_channels: int = 4,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256),
        use_cls_head: bool = True,
    ) -> None:
        channels = check_channels("channels", channels)
        super().__init__(diffusion, out_channels, 2 ** (len(channels) - 1))
        self.unet = ImageUNet(in_channels, out_channels, channels)
        self.cls_head = GradingHead(channels[-1]) if use_cls_head else None

    @property
    def bottleneck(self) -> nn.Module:
        """See :meth:`Baseline.bottleneck`."""
        return self.unet.bottleneck

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Baseline.predict`."""
        seg_logits, features, _ = self.unet(image)
        return seg_logits, self.cls_head(features[-1]) if self.cls_head is not None else None


class GradingResNet(Baseline):
    """MONAI's ResNet-18, which grades slices and finds no tumour: for ``tasks: [grading]``.

    A subject's grade is then the mean over all of its slices with brain, for no area weights them.

    Args:
        diffusion: see :class:`Baseline`.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions, all of them empty.
    """

    def __init__(self, diffusion: GaussianDiffusion, in_channels: int = 4, out_channels: int = 1) -> None:
        super().__init__(diffusion, out_channels, divisor=1)
        self.cls_head = resnet18(spatial_dims=2, n_input_channels=in_channels, num_classes=2)

    def predict(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Baseline.predict`."""
        empty = image.new_full((image.shape[0], self.out_channels, *image.shape[2:]), NO_TUMOUR)
        return empty, self.cls_head(image)
