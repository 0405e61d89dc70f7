"""Dictionary transforms of CTs and their label maps that MONAI lacks."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from scripts.config import InputError
from scripts.organs.structures import catalogue

logger = logging.getLogger(__name__)

NO_AIR = -500  # HU; a CT has darker voxels, an image of another kind or raw values do not


class CheckHounsfieldd(MapTransform):
    """Warn about a volume without air: it is no CT in Hounsfield units, and the structures would be wrong."""

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        for key in self.key_iterator(dict(data)):
            if (darkest := float(data[key].min())) > NO_AIR:
                logger.warning(
                    f"subject '{data.get('subject', '?')}': the darkest voxel is {darkest:g}; a CT in Hounsfield units "
                    f"has air below {NO_AIR}. MR images and raw values are not segmented correctly"
                )
        return dict(data)


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
            d[key] = d[key].clone()  # keeps the metadata
            d[key].copy_(self.table.to(indices.device)[indices.long()])
        return d


class NeighboursToChannelsd(MapTransform):
    """A slice and its neighbours as channels: ``[1, H, W, k]`` to ``[k, H, W]``, k odd.

    Args:
        keys: keys of images.
        label_keys: keys of label maps, of which only the middle slice is kept, ``[1, H, W]``.
    """

    def __init__(self, keys: KeysCollection, label_keys: Sequence[str] = ()) -> None:
        super().__init__(keys)
        self.label_keys = label_keys

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = torch.as_tensor(d[key])[0].movedim(-1, 0)
        for key in self.label_keys:
            d[key] = torch.as_tensor(d[key])[..., d[key].shape[-1] // 2]
        return d
