"""The two U-Nets: one sees only the image, the other denoises masks. Both also return features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import DiffusionModelUNet, DynUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from scripts.networks.conditioning import MODULES
from scripts.networks.variants import Variant


class ImageUNet(DynUNet):
    """MONAI's DynUNet (nnU-Net's U-Net) whose forward also returns its features.

    It uses group norm. Instance norm would remove the mean of each channel, which a pooled grading head needs.

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
        """Map ``[B, M, H, W]`` to logits ``[B, R, H, W]``, each level's features, and the last decoded features."""
        features = [self.input_block(x)]
        for layer in (*self.downsamples, self.bottleneck):
            features.append(layer(features[-1]))
        decoded = features[-1]
        for layer, skip in zip(self.upsamples, reversed(features[:-1]), strict=True):
            decoded = layer(decoded, skip)
        return self.output_block(decoded), features, decoded


class Denoiser(DiffusionModelUNet):
    """MONAI's diffusion U-Net with conditioning modules; its forward also returns the bottleneck features.

    A module acts at the place that its class names: ``stem`` (after the first convolution), ``level`` (at the start of
    each of the two middle levels) or ``bottom`` (before the middle block).

    Args:
        in_channels: channels of image, noisy mask and everything else that is concatenated.
        out_channels: R, number of target regions.
        variant: width, depth, attention and conditioning.
        image_channels: channels of the image-only U-Net's levels; empty without one.
        stride: the input is averaged over squares of this side (pixels), and the output is interpolated back.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        variant: Variant,
        image_channels: Sequence[int],
        stride: int = 1,
    ) -> None:
        channels = variant.channels
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
        self.stride = stride
        middle, deepest = (len(channels) - 1) // 2, len(image_channels) - 1
        # by place: the denoiser's channels there, and which of the image's features a module sees (-1: the decoded).
        # Features that enter a level have the width of the level above; the image-only U-Net may have fewer levels.
        places = {"stem": (channels[0], -1)}
        places |= {f"level{k}": (channels[k - 1], min(k, deepest)) for k in (middle, middle + 1)}
        places |= {"bottom": (channels[-1], deepest)}
        widths = [*image_channels, *image_channels[:1]] or [0]
        self.image_level = {place: level for place, (_, level) in places.items()}
        self.conditioning = nn.ModuleDict()
        for place, (width, level) in places.items():
            self.conditioning[place] = nn.ModuleDict(
                {
                    name: module(width, widths[level], 4 * channels[0])
                    for name, module in MODULES.items()
                    if name in variant.conditioning and place.rstrip("0123456789") == module.place
                }
            )

    def prepare(self, features: Sequence[torch.Tensor], decoded: torch.Tensor) -> dict[str, torch.Tensor]:
        """The modules' part that depends on the image-only U-Net's features alone, as ``{"<place>_<module>": tensor}``.

        Args:
            features: of each level ``[B, C', h, w]``.
            decoded: last decoded features ``[B, C', H, W]``.
        """
        prepared = {
            f"{place}_{name}": module.prepare([*features, decoded][self.image_level[place]])
            for place, modules in self.conditioning.items()
            for name, module in modules.items()  # type: ignore[operator]
        }
        return {name: tensor for name, tensor in prepared.items() if tensor is not None}

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``[B, C, H, W]`` and timesteps ``[B]`` to the output ``[B, R, H, W]`` and features ``[B, C', h, w]``."""
        emb = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype))

        def apply(place: str, h: torch.Tensor) -> torch.Tensor:
            for name, module in self.conditioning[place].items():  # type: ignore[operator]
                h = module(h, condition.get(f"{place}_{name}"), emb)
            return h

        size = x.shape[2:]
        if self.stride > 1:
            x = nn.functional.avg_pool2d(x, self.stride)
        h = apply("stem", self.conv_in(x))
        skips = [h]
        for level, block in enumerate(self.down_blocks, start=1):
            h, residuals = block(hidden_states=h, temb=emb)
            h = apply(f"level{level}", h) if f"level{level}" in self.conditioning else h
            skips.extend([*residuals[:-1], h])
        middle = h = self.middle_block(hidden_states=apply("bottom", h), temb=emb)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            h = block(hidden_states=h, res_hidden_states_list=skips[-count:], temb=emb)
            del skips[-count:]
        output = self.out(h)
        if self.stride > 1:
            output = nn.functional.interpolate(output, size, mode="bilinear", align_corners=False)
        return output, middle
