"""Discriminators: networks that tell true slices from made ones, on several scales."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from monai.networks.blocks import ResidualUnit
from monai.networks.blocks.spatialattention import SpatialAttentionBlock
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from scripts.config import InputError

GROUPS = 8  # of the group norm before the attention
ATTENDED = 32  # largest side of what the attention compares: its memory grows with the fourth power of the side


class ResidualDiscriminator(nn.Module):
    """MONAI's ResidualUnits with stride 2, spatial attention, and a convolution to one logit per patch.

    Args:
        in_channels: of the slices.
        channels: of the first unit, a multiple of 8; doubled by each further one.
        units: number of units.
    """

    def __init__(self, in_channels: int, channels: int, units: int) -> None:
        super().__init__()
        widths = [in_channels, *(channels * 2**index for index in range(units))]
        act = ("leakyrelu", {"negative_slope": 0.2})
        self.units = nn.ModuleList(
            ResidualUnit(2, before, after, strides=2, norm=None, act=act)
            for before, after in itertools.pairwise(widths)
        )
        self.attention = SpatialAttentionBlock(2, widths[-1], norm_num_groups=GROUPS)
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of each unit, and logits ``[B, 1, h, w]``, of slices ``[B, C, H, W]``."""
        features = []
        for unit in self.units:
            x = unit(x)
            features.append(x)
        return [*features, self.last(x + self._attended(x))]

    def _attended(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention adds, at a side of at most 32 pixels."""
        height, width = x.shape[2:]
        pooled = nn.functional.adaptive_avg_pool2d(x, (min(height, ATTENDED), min(width, ATTENDED)))
        return nn.functional.interpolate(self.attention(pooled) - pooled, x.shape[2:], mode="bilinear")


class Pyramid(nn.Module):
    """One discriminator per scale. Each sees the slices at half the size of the one before, by average pooling.

    MONAI's MultiScalePatchDiscriminator is not used: at three scales it has 11 billion parameters.

    Args:
        make: makes the discriminator of a scale.
        scales: number of scales.
    """

    def __init__(self, make: Callable[[], nn.Module], scales: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(make() for _ in range(scales))
        for module in list(self.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                spectral_norm(module)  # Miyato et al., ICLR 2018

    def forward(self, x: torch.Tensor) -> list[list[torch.Tensor]]:
        """Features and logits of each scale, for slices ``[B, C, H, W]``; the last of each list are the logits."""
        found = []
        for index, scale in enumerate(self.scales):
            found.append(scale(x if not index else nn.functional.avg_pool2d(x, 2**index)))
        return found

    @torch.no_grad()
    def check(self, in_channels: int, shape: Sequence[int]) -> None:
        """Raise InputError if slices ``[H, W]`` are too small for one of the scales."""
        before = self.training
        try:
            self.eval()(torch.zeros(1, in_channels, *shape, device=next(self.parameters()).device))
        except RuntimeError as error:
            raise InputError(
                f"slices of {shape[0]} x {shape[1]} px are too small for the {len(self.scales)} scales of the "
                "discriminator: lower discriminator_def::scales or discriminator_def::layers"
            ) from error
        finally:
            self.train(before)


def build(kind: str, in_channels: int, channels: int = 32, layers: int = 3, scales: int = 2) -> Pyramid:
    """A discriminator of slices, with spectral norm in every layer.

    Args:
        kind: ``patchgan``, MONAI's PatchDiscriminator, or ``resblock``, :class:`ResidualDiscriminator`.
        in_channels: of the slices.
        channels: of the first layer; doubled by each further one.
        layers: number of layers.
        scales: number of scales.

    Raises:
        InputError: for another kind, or numbers below 1.
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "patchgan": lambda: PatchDiscriminator(2, channels, in_channels, num_layers_d=layers, norm=None),  # type: ignore[arg-type]
        "resblock": lambda: ResidualDiscriminator(in_channels, channels, layers),
    }
    if kind not in makers:
        raise InputError(f"discriminator '{kind}' is not one of {list(makers)}")
    if min(channels, layers, scales) < 1 or (kind == "resblock" and channels % GROUPS):
        raise InputError(
            f"discriminator_def: channels={channels}, layers={layers} and scales={scales} must be 1 or more, and the "
            f"channels of resblock a multiple of {GROUPS}"
        )
    return Pyramid(makers[kind], scales)
