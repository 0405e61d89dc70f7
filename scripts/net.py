"""The diffusion segmentation network with a grading head, and the plain U-Net it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import DiffusionModelUNet, DynUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from scripts.config import InputError
from scripts.diffusion import GaussianDiffusion

# channels of the denoiser's levels; one down-sampling fewer than levels (4, 5, 6, 6 as in MedSegDiff V1)
VARIANTS: dict[str, tuple[int, ...]] = {
    "S": (16, 32, 32, 64, 64),
    "B": (32, 32, 64, 64, 128, 128),
    "L": (64, 64, 128, 128, 256, 256, 256),
    "++": (96, 96, 192, 192, 384, 384, 384),
}


class Standardise(nn.BatchNorm1d):
    """Batch norm without weights of ``[B, C]``; a batch of one is standardised by the running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        training = self.training and len(x) > 1
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=training, eps=self.eps)


class GradingHead(nn.Sequential):
    """Grade logits ``[B, 2]`` from bottleneck features ``[B, C, h, w]``: pool, C -> C/2 -> 2.

    From slice to slice the pooled features move by a hundredth of their size. Unless they are standardised, the first
    layer sees a constant, and its ReLUs learn the share of the grades and die (docs/results.md).
    """

    def __init__(self, channels: int) -> None:
        hidden = max(channels // 2, 1)
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            Standardise(channels),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, 2),
        )


class Denoiser(DiffusionModelUNet):
    """MONAI's diffusion U-Net whose forward also returns the features after the middle block."""

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Map ``[B, C, H, W]`` and timesteps ``[B]`` to the output ``[B, R, H, W]`` and features ``[B, C', h, w]``."""
        emb = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype))
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h, residuals = block(hidden_states=h, temb=emb)
            skips.extend(residuals)
        middle = h = self.middle_block(hidden_states=h, temb=emb)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            h = block(hidden_states=h, res_hidden_states_list=skips[-count:], temb=emb)
            del skips[-count:]
        return self.out(h), middle


class MedSegDiff(nn.Module):
    """Diffusion model of masks, conditioned on the image, that also grades.

    A U-Net that sees only the image gives the calibration map: a first answer, computed once per slice. The denoiser
    sees the image, the noisy mask and that map, and corrects it at every step: with ``prediction_type: sample``,
    ``seg_logits`` is the calibration map plus the denoiser's output, which is zero in a fresh network. So training
    starts where a plain U-Net does, and the costly part of the work is not repeated per step.

    Args:
        diffusion: noise schedule; says what the denoiser's output means.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        variant: width and depth by name, one of :data:`VARIANTS`.
        channels: channels of the denoiser's levels; overrides ``variant``.
        calib_channels: channels of the image-only U-Net's levels; default twice ``channels``.
        num_res_blocks: residual blocks per level of the denoiser.
        use_cls_head: grade from the denoiser's bottleneck.
        self_conditioning: the denoiser also sees the estimate of x_0 of the step before.

    Raises:
        InputError: for an unknown variant or an unusable list of channels.
    """

    brain_temperature: torch.Tensor
    lesion_temperature: torch.Tensor
    grade_temperature: torch.Tensor

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        in_channels: int = 4,
        out_channels: int = 1,
        variant: str = "S",
        channels: Sequence[int] | None = None,
        calib_channels: Sequence[int] | None = None,
        num_res_blocks: int = 1,
        use_cls_head: bool = True,
        self_conditioning: bool = False,
    ) -> None:
        super().__init__()
        if channels is None and variant not in VARIANTS:
            raise InputError(f"variant '{variant}' is not one of {list(VARIANTS)}")
        channels = _check_channels("channels", channels or VARIANTS[variant])
        calib_channels = _check_channels("calib_channels", calib_channels or [2 * width for width in channels])
        self.diffusion = diffusion
        self.out_channels = out_channels
        self.self_conditioning = self_conditioning
        self.divisor = 2 ** (max(len(channels), len(calib_channels)) - 1)
        self.calibrator = image_unet(in_channels, out_channels, calib_channels)
        self.denoiser = Denoiser(
            spatial_dims=2,
            in_channels=in_channels + (3 if self_conditioning else 2) * out_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            channels=channels,
            attention_levels=[False] * len(channels),  # the middle block has attention of its own
            norm_num_groups=math.gcd(*channels, 32),
            num_head_channels=math.gcd(channels[-1], 64),
        )
        self.cls_head = GradingHead(channels[-1]) if use_cls_head else None
        _register_temperatures(self, out_channels)

    @property
    def bottleneck(self) -> nn.Module:
        """Where the tasks part: its output feeds the grading head and the decoder."""
        return self.denoiser.middle_block

    def calibrate(self, image: torch.Tensor) -> torch.Tensor:
        """Image-only branch: image ``[B, M, H, W]`` to logits of the calibration map ``[B, R, H, W]``."""
        check_image_size(image.shape[2:], self.divisor)
        return self.calibrator(image)

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        calib_map: torch.Tensor | None = None,
        estimate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | torch.Tensor:
        """Predict the clean mask and the grade from an image and a noisy mask.

        Args:
            image: slices ``[B, M, H, W]``, z-scored.
            x_t: noisy masks ``[B, R, H, W]``.
            timesteps: ``[B]``, 0 to T - 1.
            calib_map: what :meth:`calibrate` gave for ``image``, so that sampling computes it once.
            estimate: x_0 ``[B, R, H, W]`` of the step before, for self-conditioning; none is 0.

        Returns:
            ``(seg_logits [B, R, H, W], cls_logits [B, 2] or None, calib_map [B, R, H, W])``. Called with the image
            alone, as MONAI's export and verification do, it returns the ``seg_logits`` of one evaluation from
            x_t = 0 at T - 1.
        """
        alone = x_t is None
        if x_t is None:
            x_t = image.new_zeros(len(image), self.out_channels, *image.shape[2:])
        steps = self.diffusion.num_train_timesteps
        if timesteps is None:
            timesteps = torch.full((len(image),), steps - 1, device=image.device)
        if calib_map is None:
            calib_map = self.calibrate(image)
        x = [image, x_t, torch.tanh(calib_map / 2)]
        if self.self_conditioning:
            x.append(torch.zeros_like(x_t) if estimate is None else estimate)
        output, features = self.denoiser(torch.cat(x, dim=1), timesteps * (1000 / steps))
        if self.diffusion.prediction_type == "sample":
            output = calib_map + output
        seg_logits = self.diffusion.to_logits(output, x_t, timesteps)
        if alone:
            return seg_logits
        return seg_logits, self.cls_head(features) if self.cls_head is not None else None, calib_map


class PlainUNet(nn.Module):
    """The honest baseline: a plain MONAI U-Net, with the same grading head on its bottleneck.

    It has the signature of :class:`MedSegDiff` and ignores the noisy mask, so that data, losses, minutes and
    evaluation are the same; its calibration map is its only output.

    Args:
        diffusion: ignored but for ``prediction_type``, which must be ``sample``.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        channels: channels of its levels.
        use_cls_head: grade from its bottleneck.
    """

    brain_temperature: torch.Tensor
    lesion_temperature: torch.Tensor
    grade_temperature: torch.Tensor

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        in_channels: int = 4,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256),
        use_cls_head: bool = True,
    ) -> None:
        super().__init__()
        if diffusion.prediction_type != "sample":
            raise InputError("the plain U-Net predicts masks: leave prediction_type at 'sample'")
        channels = _check_channels("channels", channels)
        self.diffusion = diffusion
        self.out_channels = out_channels
        self.self_conditioning = False
        self.divisor = 2 ** (len(channels) - 1)
        self.unet = image_unet(in_channels, out_channels, channels)
        self.bottleneck.register_forward_hook(self._keep_features)
        self.cls_head = GradingHead(channels[-1]) if use_cls_head else None
        _register_temperatures(self, out_channels)

    @property
    def bottleneck(self) -> nn.Module:
        """Where the tasks part: its output feeds the grading head and the decoder."""
        return self.unet.bottleneck

    def _keep_features(self, module: nn.Module, inputs: tuple, features: torch.Tensor) -> None:
        self.features = features

    def calibrate(self, image: torch.Tensor) -> None:
        """Nothing to compute ahead: the one evaluation is the whole network."""

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        calib_map: None = None,
        estimate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None] | torch.Tensor:
        """See :meth:`MedSegDiff.forward`; there is no calibration map."""
        check_image_size(image.shape[2:], self.divisor)
        seg_logits = self.unet(image)
        if x_t is None:
            return seg_logits
        return seg_logits, self.cls_head(self.features) if self.cls_head is not None else None, None


def _register_temperatures(network: nn.Module, out_channels: int) -> None:
    """Temperatures of the masks ``[R]`` and of the grade, 1 until they are fitted; they travel with the weights."""
    network.register_buffer("brain_temperature", torch.ones(out_channels))
    network.register_buffer("lesion_temperature", torch.ones(out_channels))
    network.register_buffer("grade_temperature", torch.tensor(1.0))


def image_unet(in_channels: int, out_channels: int, channels: Sequence[int]) -> DynUNet:
    """nnU-Net's U-Net with group norm, which keeps what instance norm would hide from a pooled grading head."""
    levels = len(channels)
    return DynUNet(
        spatial_dims=2,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=channels,
        norm_name=("group", {"num_groups": math.gcd(*channels, 8)}),
    )


def check_image_size(size: Sequence[int], divisor: int) -> None:
    """Raise InputError when the sides of a slice cannot be halved once per level."""
    if any(side % divisor for side in size):
        raise InputError(f"image_size {tuple(size)} must be divisible by {divisor}: 2 per down-sampling")


def _check_channels(name: str, channels: Sequence[int]) -> list[int]:
    widths = [int(width) for width in channels] if isinstance(channels, Sequence) else []
    if len(widths) < 3 or min(widths) < 1:
        raise InputError(f"{name}={channels!r} must list three or more positive widths, one per level")
    return widths
