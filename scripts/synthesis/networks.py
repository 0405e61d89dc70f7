"""Networks of the chain: a generator, and a refiner of its output. Both start as the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.blocks import ResidualUnit
from monai.networks.nets import BasicUNet
from torch import nn

from scripts.config import InputError

INTERMEDIATES = ("direct", "product", "both")
GROUPS = 8  # of the group norm; instance norm would depend on the field of view


class Generator(nn.Module):
    """MONAI's BasicUNet with group norm; its output is added to the native slice.

    Args:
        num_slices: channels of the input, a slice and its neighbours; odd.
        features: channels of the levels of the U-Net, and of its last layer; multiples of 8.
    """

    def __init__(self, num_slices: int, features: Sequence[int]) -> None:
        super().__init__()
        if any(channels % GROUPS for channels in features):
            raise InputError(f"features={list(features)} must be multiples of {GROUPS}")
        self.middle = num_slices // 2
        self.unet = BasicUNet(
            spatial_dims=2,
            in_channels=num_slices,
            out_channels=1,
            features=features,
            norm=("group", {"num_groups": GROUPS}),
        )
        zero(self.unet.final_conv)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Contrast slices ``[B, 1, H, W]`` of native ones ``[B, num_slices, H, W]``, in -1 to 1."""
        return image[:, self.middle, None] + self.unet(image)


class RefineNet(nn.Module):
    """MONAI's ResidualUnits at full resolution; what they find is added to the input.

    Args:
        in_channels: of the input; the first is refined.
        width: channels of the units, a multiple of 8.
        units: number of units.
    """

    def __init__(self, in_channels: int = 1, width: int = 64, units: int = 6) -> None:
        super().__init__()
        norm = ("group", {"num_groups": GROUPS})
        blocks = [ResidualUnit(2, in_channels if not i else width, width, norm=norm) for i in range(units)]
        self.units, self.last = nn.Sequential(*blocks), zero(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refined slices ``[B, 1, H, W]`` of ``[B, in_channels, H, W]``."""
        return x[:, :1] + self.last(self.units(x))


class FrozenRefine(nn.Module):
    """A generator that does not change, and a refiner of its output.

    Args:
        generator: has its weights; it is never trained and stays in evaluation mode.
        intermediate: what the refiner gets: ``direct``, the output of the generator; ``product``, the native slice
            times the magnitude of that output; ``both``, as two channels.
        width: see :class:`RefineNet`.
        units: likewise.
    """

    def __init__(self, generator: Generator, intermediate: str = "direct", width: int = 64, units: int = 6) -> None:
        super().__init__()
        if intermediate not in INTERMEDIATES:
            raise InputError(f"intermediate '{intermediate}' is not one of {list(INTERMEDIATES)}")
        self.generator = generator.requires_grad_(False)
        self.intermediate = intermediate
        self.refiner = RefineNet(2 if intermediate == "both" else 1, width, units)
        self.train()

    def train(self, mode: bool = True) -> FrozenRefine:
        """Set the mode of the refiner alone."""
        super().train(mode)
        self.generator.eval()
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Contrast slices ``[B, 1, H, W]`` of native ones ``[B, num_slices, H, W]``, in -1 to 1."""
        with torch.no_grad():
            generated = self.generator(image)
        product = image[:, self.generator.middle, None] * generated.abs()
        inputs = {"direct": [generated], "product": [product], "both": [generated, product]}[self.intermediate]
        return self.refiner(torch.cat(inputs, dim=1))


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def build(settings: Mapping[str, Any]) -> Generator | FrozenRefine:
    """The network of settings, which are saved with its weights; without ``intermediate`` it is the generator alone."""
    generator = Generator(settings["num_slices"], settings["features"])
    if settings["intermediate"] is None:
        return generator
    return FrozenRefine(generator, settings["intermediate"], settings["refiner_width"], settings["refiner_units"])
