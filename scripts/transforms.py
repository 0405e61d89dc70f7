"""Dictionary transforms that MONAI lacks: safe reading, checks, regions, slices, modality dropout, atomic files."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import LoadImaged, MapTransform, RandomizableTransform, ThreadUnsafe

from scripts.config import InputError, atomic_path


class LoadVolumesd(LoadImaged, ThreadUnsafe):
    """MONAI's LoadImaged for threads that fill a cache, each of which gets a copy.

    Its NIfTI reader keeps the names of the files that it is reading: with two threads, a volume of four modalities may
    come out with the one channel of another's label, without an error.
    """


class CheckVolumed(MapTransform):
    """Refuse volumes that would poison training: NaN or infinite voxels, or a modality of one single value.

    Each key holds ``[M, H, W, S]``, one channel per modality; ``subject`` names the volume in the message.

    Raises:
        InputError: naming the subject and the file.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        for key in self.key_iterator(dict(data)):
            for channel, volume in enumerate(data[key]):
                where = f"subject '{data.get('subject', '?')}': modality {channel + 1} of {len(data[key])}"
                if not torch.isfinite(torch.as_tensor(volume)).all():
                    raise InputError(f"{where} has NaN or infinite voxels; repair or remove the subject")
                if volume.min() == volume.max():
                    raise InputError(f"{where} is constant ({float(volume.min()):g}); repair or remove the subject")
        return dict(data)


class LabelToRegionsd(MapTransform):
    """Turn a label map into one binary channel per region.

    ``[1, H, W, S]`` of label values becomes ``[R, H, W, S]`` float of 0 and 1. MONAI's
    ``ConvertToMultiChannelBasedOnBratsClassesd`` knows BraTS alone and accepts any value.

    Args:
        keys: keys of the label maps.
        regions: names of the wanted regions, in channel order, e.g. ``["TC", "WT", "ET"]``.
        region_labels: label values of every known region, e.g. ``{"WT": [1, 2, 4]}``.

    Raises:
        InputError: for an unknown region, or (when called) a label value that belongs to no known region.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Sequence[str],
        region_labels: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__(keys)
        check_regions(regions, region_labels)
        self.values = [list(region_labels[region]) for region in regions]
        self.known = sorted({0}.union(*map(set, region_labels.values())))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            label = d[key]
            unknown = sorted(set(torch.unique(torch.as_tensor(label)).tolist()) - set(self.known))
            if unknown:
                raise InputError(
                    f"subject '{d.get('subject', '?')}': the segmentation has label values {unknown[:5]} outside "
                    f"{self.known}; set 'region_labels' (BraTS 2023 uses 3 for ET: add configs/data_brats2023.yaml)"
                )
            channels = [torch.isin(torch.as_tensor(label), torch.tensor(v, dtype=label.dtype)) for v in self.values]
            regions = torch.cat(channels).float()
            d[key] = MetaTensor(regions, meta=label.meta) if isinstance(label, MetaTensor) else regions
        return d


class RegionsToLabeld(MapTransform):
    """Turn binary region channels back into one label map, the inverse of :class:`LabelToRegionsd`.

    ``[R, H, W, S]`` becomes ``[1, H, W, S]`` uint8. A single region is 1. Of several, large ones are painted first,
    so that the result is always nested (ET inside TC inside WT); each paints its first value that no smaller one has.

    Args:
        keys: keys of the region channels.
        regions: names of the channels.
        region_labels: label values of every region.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Sequence[str],
        region_labels: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__(keys)
        check_regions(regions, region_labels)
        self.paint: list[tuple[int, int]] = []  # channel and value, in the order of painting
        if len(regions) == 1:
            self.paint.append((0, 1))
            return
        order = sorted(range(len(regions)), key=lambda channel: -len(region_labels[regions[channel]]))
        for rank, channel in enumerate(order):
            smaller = {value for other in order[rank + 1 :] for value in region_labels[regions[other]]}
            values = region_labels[regions[channel]]
            self.paint.append((channel, next((v for v in values if v not in smaller), values[0])))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            regions = d[key]
            label = torch.zeros_like(regions[:1], dtype=torch.uint8)
            for channel, value in self.paint:
                label[0].masked_fill_(regions[channel] > 0, value)
            d[key] = label
        return d


def check_regions(regions: Sequence[str], region_labels: Mapping[str, Sequence[int]]) -> None:
    """Raise InputError unless ``regions`` is a list of distinct names that ``region_labels`` defines."""
    unknown = [region for region in regions if region not in region_labels]
    if isinstance(regions, str) or not regions or unknown or len(set(regions)) != len(regions):
        raise InputError(f"regions={regions!r} must be a list of distinct names from {list(region_labels)}")


class SliceIndicesd(MapTransform):
    """Add ``fg_indices`` and ``bg_indices`` for ``RandCropByPosNegLabeld``: one flat voxel index per axial slice.

    ``fg_indices`` holds the centre voxel of every slice of the label ``[R, H, W, S]`` with tumour, ``bg_indices``
    that of every other slice in which the image ``[M, H, W, S]`` shows brain (any non-zero voxel). Slices are
    then drawn evenly, whatever the tumour's area, and the whole volume is not searched anew for every crop.

    Args:
        keys: the label's key.
        image_key: the image's key.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d: dict = dict(data)
        for key in self.key_iterator(d):
            tumour = torch.as_tensor(d[key]).flatten(0, 2).any(dim=0)
            brain = (torch.as_tensor(d[self.image_key]) != 0).flatten(0, 2).any(dim=0)
            height, width, depth = d[key].shape[1:]
            centre = (height // 2 * width + width // 2) * depth
            d["fg_indices"] = (centre + torch.nonzero(tumour).flatten()).numpy()
            d["bg_indices"] = (centre + torch.nonzero(brain & ~tumour).flatten()).numpy()
        return d


class RandModalityDropoutd(RandomizableTransform, MapTransform):
    """Set one modality of ``[M, H, W]``, M > 1, to zero (the mean of its z-scores), as if it had not been acquired.

    Args:
        keys: keys of the images.
        prob: how often.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.1) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        self.randomize(None)
        for key in self.key_iterator(d):
            if self._do_transform and len(d[key]) > 1:
                d[key] = d[key].clone()
                d[key][self.R.randint(len(d[key]))] = 0
        return d


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, except that an interrupted write leaves no half of a file behind."""

    def write(self, filename, verbose: bool = False, **obj_kwargs) -> None:
        with atomic_path(filename) as path:
            super().write(path, verbose=verbose, **obj_kwargs)


def subject_name(metadict: Mapping, saver: object) -> dict:
    """``output_name_formatter`` of ``SaveImaged``: the subject is the folder that its files lie in."""
    return {"subject": Path(metadict["filename_or_obj"]).parent.name, "idx": None}


def entropy_bits(prob: torch.Tensor) -> torch.Tensor:
    """Predictive entropy of a Bernoulli probability, in bits: 0 where sure, 1 at 0.5; any shape."""
    return torch.special.entr(prob).add(torch.special.entr(1 - prob)).div(float(np.log(2)))
