"""Conversion of label maps to region channels and back."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from scripts.config import InputError

MAX_VOTE_ERROR = 0.1  # rounding of shares to 8 bits
FAR_SHARE = 0.02  # largest share of pixels of a JPEG mask whose value may be far from every label value


class RegionCoding:
    """Conversion between a label map and region channels, which may overlap.

    MONAI's ``ConvertToMultiChannelBasedOnBratsClassesd`` supports only BraTS and accepts any label value.

    Args:
        regions: names of the target regions, in channel order, e.g. ``["TC", "WT", "ET"]``.
        region_labels: label values of every region that the label maps may have, e.g. ``{"WT": [1, 2, 4]}``.
        background_label: label value outside all regions.

    Raises:
        InputError: for an unknown or repeated region, label values that are not whole numbers from 0 to 255, or
            two regions that overlap although neither contains the other.
    """

    def __init__(
        self, regions: Sequence[str], region_labels: Mapping[str, Sequence[int]], background_label: int = 0
    ) -> None:
        _check(regions, region_labels, background_label)
        self.background_label = background_label
        self.values = [list(region_labels[region]) for region in regions]
        self.known_values = sorted({background_label}.union(*map(set, region_labels.values())))
        self.paint: list[tuple[int, int]] = []  # channel and label value, in painting order
        order = sorted(range(len(regions)), key=lambda channel: -len(self.values[channel]))
        for rank, channel in enumerate(order):
            smaller = {value for other in order[rank + 1 :] for value in self.values[other]}
            own = [value for value in self.values[channel] if value not in smaller]
            self.paint.append((channel, (own or self.values[channel])[0]))

    def to_regions(self, label: torch.Tensor, where: str = "", lossy: bool = False) -> torch.Tensor:
        """Convert a label map ``[1, H, W, S]`` to region channels ``[R, H, W, S]``, floats of 0 and 1.

        Args:
            label: label map. Several label maps ``[n, H, W, S]`` of one image are united, region by region.
            where: start of the error message, which names the subject.
            lossy: the label map is a JPEG file. Values between known ones become the nearest one, with a warning.

        Raises:
            InputError: for a label value that is neither background nor in ``region_labels``.
        """
        if lossy and self._unknown(label):
            label = self._nearest(label)
        if unknown := self._unknown(label):
            raise InputError(
                f"{where}the segmentation has label values {unknown[:5]} outside {self.known_values}; set "
                "'region_labels' and 'background_label' (BraTS 2023 uses 3 for ET: add configs/data_brats2023.yaml)"
            )
        regions = [torch.isin(label, label.new_tensor(values)).any(dim=0) for values in self.values]
        return torch.stack(regions).float()

    def to_label(self, regions: torch.Tensor) -> torch.Tensor:
        """Convert region channels ``[n * R, H, W, S]`` of n masks to uint8 label maps ``[n, H, W, S]``.

        Regions with many label values are painted first, so that the regions of the result are always nested (ET inside
        TC inside WT). Each region is painted with its first label value that no later region has.
        """
        masks = regions.unflatten(0, (-1, len(self.values)))
        label = torch.full_like(masks[:, 0], self.background_label, dtype=torch.uint8)
        for channel, value in self.paint:
            label.masked_fill_(masks[:, channel] > 0, value)
        return label

    def _unknown(self, label: torch.Tensor) -> list[float]:
        return torch.unique(label[~torch.isin(label, label.new_tensor(self.known_values))]).tolist()

    def _nearest(self, label: torch.Tensor) -> torch.Tensor:
        """The known value nearest to each pixel; ``label`` itself if too many pixels are far from every known value."""
        known = label.new_tensor(self.known_values)
        nearest = known[torch.bucketize(label.contiguous(), (known[1:] + known[:-1]) / 2)]
        far = (label - nearest).abs() > known.diff().min() / 4
        if far.float().mean() > FAR_SHARE:
            return label
        warnings.warn(
            f"JPEG compression has changed label values: each is replaced by the nearest of {self.known_values}; "
            "save masks as PNG to avoid this",
            stacklevel=2,
        )
        return nearest


class LabelToRegionsd(MapTransform):
    """Dictionary transform of :meth:`RegionCoding.to_regions`.

    Args:
        keys: keys of the label maps.
        coding: regions and their label values.
        allow_missing_keys: leave out a key that an item does not have.
    """

    def __init__(self, keys: KeysCollection, coding: RegionCoding, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.coding = coding

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            label = d[key]
            meta = label.meta if isinstance(label, MetaTensor) else {}
            lossy = str(meta.get("filename_or_obj", "")).lower().endswith((".jpg", ".jpeg"))
            where = f"subject '{d.get('subject', '?')}': "
            regions = self.coding.to_regions(torch.as_tensor(label), where, lossy)
            d[key] = MetaTensor(regions, meta=meta) if isinstance(label, MetaTensor) else regions
        return d


class RegionsToLabeld(LabelToRegionsd):
    """Dictionary transform of :meth:`RegionCoding.to_label`, the inverse of :class:`LabelToRegionsd`.

    Its arguments are the same; the keys are those of the region channels.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.coding.to_label(d[key])
        return d


class AnnotationsToRegionsd(MapTransform):
    """Region channels of A annotators ``[A * R, H, W, S]``, annotator by annotator, from the masks of an item.

    - By default A is 1, and the masks ``[n, H, W, S]`` are label maps that are united.
    - With the names of ``annotators``, there is one label map for each annotator.
    - With their number, there is one mask for each region, whose value says how many of them counted the voxel: as a
      number from 0 to A, or as a share of 255. The masks are taken as nested: the a-th annotator counts every voxel
      with at least a votes.

    Args:
        keys: keys of the masks.
        coding: regions and their label values.
        annotators: names of the annotators, in the order of the masks; or the number A of those whose votes the masks
            count.

    Raises:
        InputError: for another number of masks, an unknown label value, or a value that is no number of votes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        coding: RegionCoding,
        annotators: Sequence[str] | int | None = None,
    ) -> None:
        super().__init__(keys)
        names = isinstance(annotators, (list, tuple))
        if annotators is not None and not names and (not isinstance(annotators, int) or annotators < 2):
            raise InputError(f"annotators={annotators!r} must be a list of names, a number of 2 or more, or null")
        self.coding, self.annotators = coding, annotators
        self.united = LabelToRegionsd(keys, coding)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d = dict(data)
        if not self.annotators:
            return self.united(d)
        for key in self.key_iterator(d):
            masks, where = d[key], f"subject '{d.get('subject', '?')}'"
            count = len(self.coding.values) if isinstance(self.annotators, int) else len(self.annotators)
            if len(masks) != count:
                raise InputError(f"{where}: {len(masks)} masks, expected {count}")
            if isinstance(self.annotators, int):
                votes = _votes(torch.as_tensor(masks), self.annotators, where)
                regions = torch.cat([votes >= number for number in range(1, self.annotators + 1)]).float()
                d[key] = MetaTensor(regions, meta=masks.meta)
            else:
                each = [self.united({**d, key: mask[None]})[key] for mask in masks]
                d[key] = MetaTensor(torch.cat(each), meta=masks.meta)
        return d


class DrawAnnotatord(RandomizableTransform, MapTransform):
    """Keep the regions of one random annotator: ``[A * R, ...]`` becomes ``[R, ...]``.

    Args:
        keys: keys of the region channels.
        num_regions: R.
    """

    def __init__(self, keys: KeysCollection, num_regions: int) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self)
        self.num_regions = num_regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            count = len(d[key]) // self.num_regions
            start = self.R.randint(count) * self.num_regions if count > 1 else 0
            d[key] = d[key][start : start + self.num_regions]
        return d


class MajorityVoted(MapTransform):
    """Replace the regions of A annotators ``[A * R, ...]`` by those that at least half of them count ``[R, ...]``.

    With A > 1, the regions of all annotators are kept as ``annotations``.

    Args:
        keys: key of the region channels.
        num_regions: R.
    """

    def __init__(self, keys: KeysCollection, num_regions: int) -> None:
        super().__init__(keys)
        self.num_regions = num_regions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            if len(d[key]) > self.num_regions:
                d["annotations"] = d[key]
                share = torch.as_tensor(d[key]).unflatten(0, (-1, self.num_regions)).mean(dim=0)
                d[key] = MetaTensor((share >= 0.5).float(), meta=d[key].meta)
        return d


def _votes(masks: torch.Tensor, number: int, where: str) -> torch.Tensor:
    """Votes of each voxel from masks that hold them as numbers or as shares of 255."""
    votes = masks if masks.max() <= number else masks / 255 * number
    if votes.min() < 0 or not (votes - votes.round()).abs().max() <= MAX_VOTE_ERROR:  # NaN is refused too
        raise InputError(
            f"{where}: the masks hold values that are neither 0 to {number} nor shares of 255, as votes of {number} "
            "annotators are"
        )
    return votes.round()


def _check(regions: Sequence[str], region_labels: Mapping[str, Sequence[int]], background_label: int) -> None:
    unknown = [region for region in regions if region not in region_labels]
    if isinstance(regions, str) or not regions or unknown or len(set(regions)) != len(regions):
        raise InputError(f"regions={regions!r} must be a list of distinct names from {list(region_labels)}")
    for region, values in region_labels.items():
        if not values or not set(values) <= set(range(256)) - {background_label}:
            raise InputError(
                f"region_labels: {region}={list(values)} must list whole numbers from 0 to 255 without "
                f"background_label={background_label}"
            )
    for first, second in itertools.combinations(regions, 2):
        one, other = set(region_labels[first]), set(region_labels[second])
        if one & other and not (one <= other or other <= one):
            raise InputError(
                f"regions {first}={sorted(one)} and {second}={sorted(other)} overlap, but neither contains the other: "
                "predicted masks could not be saved as one label map; choose regions that are nested or separate"
            )
