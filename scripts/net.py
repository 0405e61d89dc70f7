"""The diffusion segmentation network with a grading head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import DiffusionModelUNet, DynUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from scripts.conditioning import DynamicEncoding, FFParser, SSFormer, UncertainSpatialAttention
from scripts.config import InputError
from scripts.diffusion import GaussianDiffusion
from scripts.variants import Variant, choose


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


class ImageUNet(DynUNet):
    """nnU-Net's U-Net, whose forward also returns its features.

    Its norm is group norm, which keeps what instance norm would hide from a pooled grading head.

    Args:
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        channels: channels of its levels.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: Sequence[int]) -> None:
        levels = len(channels)
        super().__init__(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=[3] * levels,
            strides=[1] + [2] * (levels - 1),
            upsample_kernel_size=[2] * (levels - 1),
            filters=channels,
            norm_name=("group", {"num_groups": math.gcd(*channels, 8)}),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Map ``[B, M, H, W]`` to logits ``[B, R, H, W]``, each level's features, and the last decoded ones."""
        features = [self.input_block(x)]
        for layer in (*self.downsamples, self.bottleneck):
            features.append(layer(features[-1]))
        decoded = features[-1]
        for layer, skip in zip(self.upsamples, reversed(features[:-1]), strict=True):
            decoded = layer(decoded, skip)
        return self.output_block(decoded), features, decoded


class Denoiser(DiffusionModelUNet):
    """MONAI's diffusion U-Net with conditioning modules, whose forward also returns the features after the middle.

    FF-Parser and dynamic encoding act where its two middle levels begin.

    Args:
        in_channels: of image, noisy mask and what else is concatenated to them.
        out_channels: R, number of target regions.
        variant: its width, depth, attention and modules.
        image_channels: channels of the image-only U-Net's levels, when there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, variant: Variant, image_channels: Sequence[int]) -> None:
        channels, modules = variant.channels, variant.conditioning
        super().__init__(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=variant.num_res_blocks,
            channels=channels,
            attention_levels=[level in variant.attention for level in range(len(channels))],
            norm_num_groups=math.gcd(*channels, 32),
            num_head_channels=math.gcd(channels[-1], 64),
        )
        embedding, middle = 4 * channels[0], (len(channels) - 1) // 2
        # what enters a level still has the channels of the one above; the image-only U-Net may be less deep
        width = {level: channels[level - 1] for level in (middle, middle + 1)}
        self.image_level = {level: min(level, len(image_channels) - 1) for level in width}
        self.parsers = nn.ModuleDict({str(k): FFParser(c) for k, c in width.items() if "ff_parser" in modules})
        self.encodings = nn.ModuleDict()
        if "dynamic_encoding" in modules:
            for level, c in width.items():
                self.encodings[str(level)] = DynamicEncoding(c, image_channels[self.image_level[level]])
        self.anchor = UncertainSpatialAttention(channels[0], image_channels[0]) if "anchor" in modules else None
        self.ss_former = SSFormer(channels[-1], image_channels[-1], embedding) if "ss_former" in modules else None

    def prepare(self, features: Sequence[torch.Tensor], decoded: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the modules compute from the image-only U-Net's features, once per slice, by name."""
        condition = {
            level: encoding.prepare(features[self.image_level[int(level)]])  # type: ignore[operator]
            for level, encoding in self.encodings.items()
        }
        if self.anchor is not None:
            condition["anchor"] = self.anchor.prepare(decoded)
        if self.ss_former is not None:
            condition["ss_former"] = self.ss_former.prepare(features[-1])
        return condition

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``[B, C, H, W]`` and timesteps ``[B]`` to the output ``[B, R, H, W]`` and features ``[B, C', h, w]``."""
        emb = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype))
        h = self.conv_in(x)
        if self.anchor is not None:
            h = self.anchor(h, condition["anchor"])
        skips = [h]
        for level, block in enumerate(self.down_blocks, start=1):
            h, residuals = block(hidden_states=h, temb=emb)
            h = self._condition(h, str(level), condition)
            skips.extend([*residuals[:-1], h])
        if self.ss_former is not None:
            h = self.ss_former(h, condition["ss_former"], emb)
        middle = h = self.middle_block(hidden_states=h, temb=emb)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            h = block(hidden_states=h, res_hidden_states_list=skips[-count:], temb=emb)
            del skips[-count:]
        return self.out(h), middle

    def _condition(self, h: torch.Tensor, level: str, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        if level in self.parsers:
            h = self.parsers[level](h)
        if level in self.encodings:
            h = self.encodings[level](h, condition[level])
        return h


class MedSegDiff(nn.Module):
    """Diffusion model of masks, conditioned on the image, that also grades.

    The denoiser sees the image and the noisy mask. With the conditioning module ``highway``, a U-Net that sees only
    the image gives the calibration map: a first answer, computed once per slice. The denoiser sees that as well, and
    corrects it at every step: with ``prediction_type: sample``, ``seg_logits`` is the calibration map plus the
    denoiser's output, which is zero in a fresh network. So training starts where a plain U-Net does, and the costly
    part of the work is not repeated per step. Without it there is the plain concatenation of image and mask.

    Args:
        diffusion: noise schedule; says what the denoiser's output means.
        in_channels: M, number of modalities.
        out_channels: R, number of target regions.
        variant: width, depth and conditioning by name, one of :data:`scripts.variants.VARIANTS`.
        channels: channels of the denoiser's levels, without attention but in the middle; overrides ``variant``.
        calib_channels: channels of the image-only U-Net's levels; overrides ``variant``, default twice ``channels``.
        num_res_blocks: residual blocks per level of the denoiser; overrides ``variant``.
        conditioning: names of :data:`scripts.conditioning.MODULES`; overrides ``variant``.
        use_cls_head: grade from the denoiser's bottleneck.
        self_conditioning: the denoiser also sees the estimate of x_0 of the step before.

    Raises:
        InputError: for an unknown variant or module, or an unusable list of channels.
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
        num_res_blocks: int | None = None,
        conditioning: Sequence[str] | None = None,
        use_cls_head: bool = True,
        self_conditioning: bool = False,
    ) -> None:
        super().__init__()
        settings = choose(variant, channels, calib_channels, num_res_blocks, conditioning)
        image_channels = settings.calib_channels or () if "highway" in settings.conditioning else ()
        self.diffusion = diffusion
        self.out_channels = out_channels
        self.self_conditioning = self_conditioning
        self.divisor = 2 ** (max(len(settings.channels), len(image_channels)) - 1)
        self.calibrator = ImageUNet(in_channels, out_channels, image_channels) if image_channels else None
        masks = 1 + (self.calibrator is not None) + self_conditioning
        self.denoiser = Denoiser(in_channels + masks * out_channels, out_channels, settings, image_channels)
        self.cls_head = GradingHead(settings.channels[-1]) if use_cls_head else None
        register_temperatures(self, out_channels)

    @property
    def bottleneck(self) -> nn.Module:
        """Where the tasks part: its output feeds the grading head and the decoder."""
        return self.denoiser.middle_block

    @property
    def has_calib_map(self) -> bool:
        """Whether there is an image-only branch."""
        return self.calibrator is not None

    @property
    def noised_mask(self) -> str:
        """What training noises by default: epsilon's loss has no bound but for the truth."""
        if self.diffusion.prediction_type == "epsilon":
            return "truth"
        return "calibration" if self.has_calib_map else "prediction"

    def condition(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """All that the image ``[B, M, H, W]`` alone decides, to be computed once per slice, by name.

        ``calib_map`` are the logits of the calibration map ``[B, R, H, W]``; the modules' parts have B first as well.
        """
        check_image_size(image.shape[2:], self.divisor)
        if self.calibrator is None:
            return {}
        calib_map, features, decoded = self.calibrator(image)
        return {"calib_map": calib_map, **self.denoiser.prepare(features, decoded)}

    def forward(
        self,
        image: torch.Tensor,
        x_t: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: dict[str, torch.Tensor] | None = None,
        estimate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | torch.Tensor:
        """Predict the clean mask and the grade from an image and a noisy mask.

        Args:
            image: slices ``[B, M, H, W]``, z-scored.
            x_t: noisy masks ``[B, R, H, W]``.
            timesteps: ``[B]``, 0 to T - 1.
            condition: what :meth:`condition` gave for ``image``, so that sampling computes it once.
            estimate: x_0 ``[B, R, H, W]`` of the step before, for self-conditioning; none is 0.

        Returns:
            ``(seg_logits [B, R, H, W], cls_logits [B, 2] or None, calib_map [B, R, H, W] or None)``. Called with the
            image alone, as MONAI's export and verification do, it returns the ``seg_logits`` of one evaluation from
            x_t = 0 at T - 1.
        """
        alone = x_t is None
        if x_t is None:
            x_t = image.new_zeros(image.shape[0], self.out_channels, *image.shape[2:])
        steps = self.diffusion.num_train_timesteps
        if timesteps is None:
            timesteps = torch.full((image.shape[0],), steps - 1, device=image.device)
        if condition is None:
            condition = self.condition(image)
        calib_map = condition.get("calib_map")
        x = [image, x_t]
        if calib_map is not None:
            x.append(torch.tanh(calib_map / 2))
        if self.self_conditioning:
            x.append(torch.zeros_like(x_t) if estimate is None else estimate)
        output, features = self.denoiser(torch.cat(x, dim=1), timesteps * (1000 / steps), condition)
        if self.diffusion.prediction_type == "sample" and calib_map is not None:
            output = calib_map + output
        seg_logits = self.diffusion.to_logits(output, x_t, timesteps)
        if alone:
            return seg_logits
        return seg_logits, self.cls_head(features) if self.cls_head is not None else None, calib_map


def register_temperatures(network: nn.Module, out_channels: int) -> None:
    """Temperatures of the masks ``[R]`` and of the grade, 1 until they are fitted; they travel with the weights."""
    network.register_buffer("brain_temperature", torch.ones(out_channels))
    network.register_buffer("lesion_temperature", torch.ones(out_channels))
    network.register_buffer("grade_temperature", torch.tensor(1.0))


def check_image_size(size: Sequence[int], divisor: int) -> None:
    """Raise InputError when the sides of a slice cannot be halved once per level."""
    if any(side % divisor for side in size):
        raise InputError(f"image_size {tuple(size)} must be divisible by {divisor}: 2 per down-sampling")
