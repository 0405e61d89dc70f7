"""Dictionary transforms of pairs of CTs, and of synthetic ones, that MONAI lacks."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import nn

from scripts.config import InputError
from scripts.synthesis.scores import ENHANCED

logger = logging.getLogger(__name__)

METAL = 3071  # HU; a CT of 12 bits ends here
TISSUE = -200  # HU; the edges of lungs and skin, which move between the two CTs, are darker
SWAPPED = 1.5  # a pair with so many times more darker than brighter voxels looks swapped
ALIKE = 1e-3  # share of the voxels that contrast brightens at least


def check_hu_range(hu_range: Any) -> tuple[float, float]:
    """Lowest and highest HU; raises InputError for anything else."""
    valid = (
        isinstance(hu_range, (list, tuple))
        and len(hu_range) == 2
        and all(isinstance(value, (int, float)) for value in hu_range)
        and hu_range[0] < hu_range[1]
    )
    if not valid:
        raise InputError(f"hu_range={hu_range!r} must be the lowest and the highest HU, such as [-1000, 600]")
    return float(hu_range[0]), float(hu_range[1])


class ToHounsfieldd(MapTransform):
    """Values from -1 to 1 as whole HU; others are clipped.

    Args:
        keys: keys of volumes ``[1, H, W, S]``.
        hu_range: the HU of -1 and of 1.
    """

    def __init__(self, keys: KeysCollection, hu_range: Sequence[float]) -> None:
        super().__init__(keys)
        self.low, self.high = check_hu_range(hu_range)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = ((d[key].clamp(-1, 1) + 1) / 2 * (self.high - self.low) + self.low).round()
        return d


class CheckPaird(MapTransform):
    """Warn of a pair that looks wrong: swapped, hardly different, or with metal. It is used all the same.

    Args:
        native: key of the native CT ``[1, H, W, S]`` (HU).
        contrast: key of the contrast CT, likewise.
    """

    def __init__(self, native: str = "image", contrast: str = "label") -> None:
        super().__init__([native, contrast])
        self.native, self.contrast = native, contrast

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        subject = f"subject '{d.get('subject', '')}'"
        native, contrast = (torch.as_tensor(d[key]) for key in (self.native, self.contrast))
        tissue = (native > TISSUE) & (contrast > TISSUE)
        difference = nn.functional.avg_pool3d(contrast - native, 3, stride=1, padding=1)  # without most of the noise
        brighter, darker = ((tissue & (part > ENHANCED)).sum() for part in (difference, -difference))
        if darker > SWAPPED * brighter:
            logger.warning(f"{subject}: more voxels are darker in the contrast CT than brighter. Are the two swapped?")
        elif brighter < ALIKE * tissue.sum():
            logger.warning(f"{subject}: contrast changes hardly a voxel. Is the native CT already enhanced?")
        for name, volume in {"native": native, "contrast": contrast}.items():
            if metal := int((volume > METAL).sum()):
                logger.warning(f"{subject}: {metal} voxels of the {name} CT are above {METAL} HU (metal) and clipped")
        return d
