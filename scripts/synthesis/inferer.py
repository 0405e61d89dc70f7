"""Synthesise whole volumes, a few slices at a time."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import DivisiblePad
from torch import nn

from scripts.config import InputError
from scripts.synthesis.networks import FrozenRefine

DIVISOR = 16  # of the sides of a slice: four down-samplings
FLIPS = ((), (2,), (3,), (2, 3))  # axes


class SynthesisInferer(Inferer):
    """Contrast volumes of native ones.

    Args:
        num_slices: a slice and its neighbours, which are channels; 1, 3 or 5.
        batch_size: slices at a time.
        tta: average the results of four flips (test-time augmentation), at four times the price.
        with_generator: also return the output of the generator of a refined network.

    Raises:
        InputError: for other numbers.
    """

    def __init__(
        self, num_slices: int = 1, batch_size: int = 2, tta: bool = False, with_generator: bool = False
    ) -> None:
        super().__init__()
        if num_slices not in (1, 3, 5):
            raise InputError(f"num_slices={num_slices!r} must be 1, 3 or 5")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be a whole number, 1 or more")
        self.num_slices = num_slices
        self.batch_size = batch_size
        self.flips = FLIPS if tta else FLIPS[:1]
        self.with_generator = with_generator
        self.pad = DivisiblePad(DIVISOR, mode="edge")

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Contrast volumes ``[B, 1, H, W, S]``; MONAI Label calls this."""
        return self.predict(inputs, network)["pred"]

    @torch.no_grad()
    def predict(self, inputs: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
        """Synthesise volumes ``[B, 1, H, W, S]`` in -1 to 1: ``pred`` and perhaps ``generator``, likewise."""
        networks = {"pred": network}
        if self.with_generator:
            networks["generator"] = network.generator if isinstance(network, FrozenRefine) else network
        volumes = torch.as_tensor(inputs)
        found = {name: torch.stack([self._predict(v[0], net) for v in volumes]) for name, net in networks.items()}
        if isinstance(inputs, MetaTensor):  # so that MONAI can invert the spatial transforms
            found = {name: MetaTensor(volume, meta=inputs.meta) for name, volume in found.items()}
        return found

    def _predict(self, volume: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Contrast volume ``[1, H, W, S]`` of a native one ``[H, W, S]``."""
        (height, width), depth = volume.shape[:2], volume.shape[-1]
        result = torch.empty_like(volume)
        # the neighbours of the first and the last slice are these slices themselves
        reach = torch.arange(self.num_slices, device=volume.device) - self.num_slices // 2
        for start in range(0, depth, self.batch_size):
            slices = torch.arange(start, min(start + self.batch_size, depth), device=volume.device)
            neighbours = (slices[:, None] + reach).clamp(0, depth - 1)
            image = volume[..., neighbours].permute(2, 3, 0, 1).float()
            padded = torch.as_tensor(self.pad(image.flatten(0, 1))).unflatten(0, image.shape[:2])
            top, left = ((new - old) // 2 for new, old in zip(padded.shape[2:], (height, width), strict=True))
            found = torch.stack([network(padded.flip(axes)).float().flip(axes) for axes in self.flips]).mean(dim=0)
            result[..., slices] = found[:, 0, top : top + height, left : left + width].movedim(0, -1)
        return result[None]
