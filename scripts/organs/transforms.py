"""Dictionary transforms of CTs and their label maps that MONAI lacks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacingd
from monai.utils import TraceKeys

from scripts.config import InputError
from scripts.organs.structures import catalogue

SLICES = 16  # that are resampled at a time


def check_windows(windows: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Windows as pairs of the lowest and the highest HU; raises InputError for anything else."""
    valid = (
        isinstance(windows, (list, tuple))
        and windows
        and all(
            isinstance(window, (list, tuple))
            and len(window) == 2
            and all(isinstance(value, (int, float)) for value in window)
            and window[0] < window[1]
            for window in windows
        )
    )
    if not valid:
        raise InputError(f"windows={windows!r} must list pairs of the lowest and highest HU, such as [[-160, 240]]")
    return [(float(low), float(high)) for low, high in windows]


def to_windows(image: torch.Tensor, windows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Channels of windows ``[B, W * C, ...]``, 0 to 1, of ``[B, C, ...]`` in HU, window by window."""
    return torch.cat([(image.clamp(low, high) - low) / (high - low) for low, high in windows], dim=1)


class HUWindowsd(MapTransform):
    """A channel for each window of Hounsfield units, clipped and scaled to 0 to 1: ``[C, ...]`` to ``[W * C, ...]``.

    Args:
        keys: keys of images in HU.
        windows: lowest and highest HU of each.

    Raises:
        InputError: for windows that are not such pairs.
    """

    def __init__(self, keys: KeysCollection, windows: Sequence[Sequence[float]]) -> None:
        super().__init__(keys)
        self.windows = check_windows(windows)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = to_windows(d[key][None], self.windows)[0]
        return d


class CompactLabelsd(MapTransform):
    """Label maps between the numbers of TotalSegmentator and classes: 0 and, for the structures, 1 to K.

    Args:
        keys: keys of label maps ``[1, ...]``.
        structures: names, in the order of the classes; other structures become background.
        inverse: from classes back to numbers.
        written: with ``inverse``, the structures that are kept; None keeps all.

    Raises:
        InputError: for values that are not whole numbers from 0 to 117.
    """

    def __init__(
        self,
        keys: KeysCollection,
        structures: Sequence[str],
        inverse: bool = False,
        written: Sequence[str] | None = None,
    ) -> None:
        super().__init__(keys)
        kept = [name if written is None or name in written else None for name in structures]
        originals = torch.tensor([catalogue()[name]["number"] if name else 0 for name in kept])
        classes = torch.arange(1, len(structures) + 1)
        source, target = (classes, originals) if inverse else (originals, classes)
        self.table = torch.zeros(256, dtype=torch.uint8)
        self.table[source] = target.to(torch.uint8)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            values = torch.as_tensor(d[key])
            indices = values.to(torch.uint8)
            wrong = values[(indices.to(values.dtype) != values) | (indices > 117)]
            if len(wrong):
                raise InputError(
                    f"subject '{d.get('subject', '?')}': the label map has the value {float(wrong[0]):g}, which is no "
                    "whole number from 0 to 117; make it with scripts.organs.merge_structures"
                )
            table, d[key] = self.table.to(indices.device), d[key].clone()  # keeps the metadata
            for result, part in zip(d[key].unbind(-1), indices.unbind(-1), strict=True):  # torch needs 64-bit indices
                result.copy_(table[part.long()])
        return d


class SliceSpacingd(Spacingd):
    """MONAI's Spacingd in the plane of the slices, whose inverse takes a few slices at a time.

    MONAI computes the coordinates of all voxels in float64, which are 1.9 GB for a label map of 512 x 512 x 300 voxels.
    It also changes every item whose key begins like the key of the image, such as the ``image_path`` of MONAI
    Label (docs/monai_traps.md).

    Args:
        keys: keys of volumes ``[C, H, W, S]``.
        spacing: of the pixels (mm); the distance of the slices is kept.
        mode: ``bilinear`` or ``nearest``.
    """

    def __init__(self, keys: KeysCollection, spacing: float, mode: Sequence[str] | str = "bilinear") -> None:
        super().__init__(keys, pixdim=(spacing, spacing, -1), mode=mode, dtype=np.float32)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict:
        return dict(data) | super().__call__({key: data[key] for key in self.key_iterator(dict(data))}, lazy)

    def inverse(self, data: Mapping[Hashable, Any]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            volume, applied = torch.as_tensor(d[key]), d[key].applied_operations[-1]
            parts: list[Any] = []
            for part in torch.split(volume, SLICES, dim=-1):
                own = applied | {TraceKeys.ORIG_SIZE: (*applied[TraceKeys.ORIG_SIZE][:2], part.shape[-1])}
                before = MetaTensor(part, meta=d[key].meta, applied_operations=[own])
                parts.append(self.spacing_transform.inverse(before))
            result = torch.cat([torch.as_tensor(part).to(volume.dtype) for part in parts], dim=-1)
            d[key] = MetaTensor(result, meta=parts[0].meta, applied_operations=d[key].applied_operations[:-1])
        return d
