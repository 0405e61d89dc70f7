"""Images of a head: geometry, contrast and artefacts of a scanner."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from monai.networks.layers import GaussianFilter
from scipy.spatial.transform import Rotation

from scripts.brains.brain import Brain, Randomisation
from scripts.brains.tissues import BRAIN, LABELS, MODALITIES, TUMOUR, Tissue, random_brightness

THICKNESSES = (1.0, 3.0, 5.0, 6.0)  # mm
TILTS = (12, 6, 8)  # standard deviations of the angles about the three axes, degrees
TEXTURE = (0.025, 0.1)  # standard deviation of the brightness of healthy tissue and of tumours
SPOILT = 0.3  # largest share of the phase-encoding lines that a moved head spoils
VOXEL = 3.0  # largest side of the square over which a pixel is a mean, mm


class Scan:
    """One examination: all modalities have the same geometry, each has its own contrast and artefacts.

    Brightness, bias field, noise and motion are those of the whole volume, so slices of a scan fit together.

    Args:
        rng: draws it.
        brain: what is scanned.
        randomisation: how random its parts are.
    """

    def __init__(self, rng: np.random.Generator, brain: Brain, randomisation: Randomisation) -> None:
        self.brain, count = brain, len(MODALITIES)
        shape, contrast, resolution = randomisation.shape, randomisation.contrast, randomisation.resolution
        self.field_of_view = 240 + shape * rng.uniform(-60, 15)  # side of a slice, mm
        tilts = rng.normal(0, np.multiply(shape, TILTS))
        self.rotation = torch.from_numpy(Rotation.from_euler("xyz", tilts, degrees=True).as_matrix()).float()
        self.offset = torch.from_numpy(rng.normal(0, np.multiply(shape, (4, 6, 4)))).float()
        self.thickness = float(rng.choice(THICKNESSES)) if rng.random() < resolution else 1.0
        self.blur_mm = resolution * rng.uniform(0, 2, count)
        self.stripped = bool(rng.random() >= 0.5 * randomisation.skull)
        self.brightness = torch.from_numpy(random_brightness(rng, contrast)).float()
        self.gamma = np.exp(rng.normal(0, 0.15 * contrast, count))
        self.bias = torch.from_numpy(contrast * rng.normal(0, 0.25, (3, count))).float()
        self.bias_square = torch.from_numpy(contrast * rng.normal(0, 0.12, count)).float()
        self.noise = rng.uniform(0.005, 0.06, count)
        self.masked = bool(rng.random() < 0.5)  # no noise outside the head
        self.moved_mm = (rng.random(count) < 0.15) * rng.uniform(2, 10, count)
        self.spoilt = rng.uniform(0, SPOILT, count)
        self.generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self.low, self.high = -62 + shape * rng.uniform(-45, 15), 75 + shape * rng.uniform(-8, 8)

    def heights(self) -> np.ndarray:
        """Heights of all slices, from below (mm)."""
        return np.arange(self.low, self.high, self.thickness)

    def points(self, heights: npt.ArrayLike, size: int) -> torch.Tensor:
        """Centres ``[size, size, S, 3]`` of the voxels of slices, in mm from the middle of the brain."""
        axis = ((torch.arange(size) + 0.5) / size - 0.5) * self.field_of_view
        grid = torch.meshgrid(axis, axis, torch.as_tensor(heights, dtype=torch.float32), indexing="ij")
        return torch.stack(grid, dim=-1) @ self.rotation.T + self.offset

    def slices(self, heights: npt.ArrayLike, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``[M, size, size, S]`` and BraTS labels ``[size, size, S]`` (uint8) of slices.

        Args:
            heights: of the slices (mm).
            size: pixels of each side.
        """
        centres = self.points(heights, size)
        pixel, up = self.field_of_view / size, self.rotation[:, 2]
        samples = 1 + 2 * max(1, round(self.thickness / 4))  # in a voxel, along a diagonal; the label is the middle one
        steps = (torch.arange(samples) + 0.5) / samples - 0.5
        image = torch.zeros(*centres.shape[:3], len(MODALITIES))
        tissues = []
        for step in steps:
            aside = self.rotation @ (torch.tensor([1.0, -1.0, 0.0]) * step * min(pixel, VOXEL))
            tissue = self.brain.tissue(centres + step * self.thickness * up + aside)
            if self.stripped:
                tissue = torch.where(tissue < BRAIN, int(Tissue.AIR), tissue)
            image += self._signal(tissue, centres) / samples
            tissues.append(tissue)
        label = torch.zeros(len(Tissue), dtype=torch.uint8)
        for tissue_number, value in LABELS.items():
            label[tissue_number] = value
        return self._measured(image, pixel), label[tissues[samples // 2]]

    def _signal(self, tissue: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Brightness ``[..., M]`` of the tissue ``[...]``, with texture and bias field."""
        scale = torch.where(tissue >= TUMOUR, TEXTURE[1], TEXTURE[0])
        signal = self.brightness[tissue] * (1 + scale * self.brain.texture(points, tissue != Tissue.AIR)).unsqueeze(-1)
        place = points / 100
        bias = place @ self.bias + place.square().sum(-1, keepdim=True) * self.bias_square
        return signal.clamp(min=0) ** torch.from_numpy(self.gamma).float() * torch.exp(bias)

    def _measured(self, image: torch.Tensor, pixel: float) -> torch.Tensor:
        """Blur, motion and Rician noise: ``[H, W, S, M]`` to ``[M, H, W, S]``; ``pixel`` is a side in mm."""
        head, found = image.sum(dim=-1) > 1e-3, []
        for modality, channel in enumerate(image.permute(3, 2, 0, 1)):
            sharp = float(self.blur_mm[modality]) / pixel < 0.2
            if not sharp:
                channel = GaussianFilter(2, float(self.blur_mm[modality]) / pixel)(channel[:, None])[:, 0]
            if self.moved_mm[modality]:
                shift = max(1, round(self.moved_mm[modality] / pixel))
                channel = self._ghosts(channel, shift, self.spoilt[modality])
            noise = float(self.noise[modality]) * torch.randn(2, *channel.shape, generator=self.generator)
            found.append(torch.hypot(channel + noise[0], noise[1]).permute(1, 2, 0))
        if self.stripped or self.masked:
            found = [channel * head for channel in found]
        return torch.stack(found)

    def _ghosts(self, slices: torch.Tensor, shift: int, share: float) -> torch.Tensor:
        """Slices ``[S, H, W]`` of a head that moved by ``shift`` pixels while a ``share`` of the lines was measured."""
        lines = torch.fft.fft2(slices)
        other = torch.fft.fft2(slices.roll(shift, dims=1))
        spoilt = torch.rand(slices.shape[1], generator=self.generator) < share
        spoilt[0] = False  # the mean brightness
        return torch.fft.ifft2(torch.where(spoilt[None, :, None], other, lines)).abs()
