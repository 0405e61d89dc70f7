"""Dictionary transforms of synthetic CTs that MONAI lacks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from scripts.config import InputError


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
