"""Registration of the synthetic slices to the contrast CT, in training alone."""

from __future__ import annotations

import warnings
from typing import Any

import ignite.distributed as idist
import torch
from monai.losses import DiffusionLoss
from monai.networks.blocks import Warp
from monai.networks.blocks.spatialattention import SpatialAttentionBlock
from monai.networks.nets import RegUNet
from torch import nn

from scripts.distributed import average_over_processes

CHANNELS, DEPTH = 16, 3  # of the first level; of the levels below it
GROUPS = 8  # of the attention's group norm


class Registration(nn.Module):
    """MONAI's RegUNet finds a displacement that brings a synthetic slice to the true one (RegGAN, Kong et al. 2021).

    The two CTs of a patient never lie exactly on each other. A network that is trained on such pairs learns a blurred
    mean. Here the loss is computed after the displacement, which a second loss keeps smooth. It starts at 0.

    Args:
        attention: add MONAI's SpatialAttentionBlock at the bottleneck.
    """

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        levels: Any = tuple(range(DEPTH + 1))  # MONAI's default is the coarsest alone
        self.network = RegUNet(
            2, 2, CHANNELS, DEPTH, out_kernel_initializer="zeros", out_channels=2, extract_levels=levels
        )
        if attention:
            block = SpatialAttentionBlock(2, CHANNELS * 2**DEPTH, norm_num_groups=GROUPS)
            self.network.bottom_block = nn.Sequential(self.network.bottom_block, block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that torch warps, not an extension in C++
            self.warp = Warp()
        self.smoothness = DiffusionLoss()
        if idist.get_world_size() > 1:  # it is no part of the network, whose gradients are averaged
            for parameter in self.parameters():
                parameter.register_hook(average_over_processes)

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The displaced slices ``[B, 1, H, W]``, and the smoothness loss.

        Args:
            pred: synthetic slices ``[B, 1, H, W]``, whose sides are multiples of 8.
            target: true slices, likewise.
        """
        displacement = self.network(torch.cat([pred, target], dim=1))  # pixels
        return self.warp(pred, displacement), self.smoothness(displacement)
