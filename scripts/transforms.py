"""Dictionary transforms that MONAI lacks: safe reading, checks, regions, slices, modality dropout; safe writing."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import LoadImaged, MapTransform, RandomizableTransform, ThreadUnsafe

from scripts.config import InputError, atomic_path
from scripts.dicom import SeriesReader
from scripts.images import PictureReader, is_picture, write_picture
from scripts.subjects import subject_of

FAR_SHARE = 0.02  # of a JPEG mask's pixels may lie far from every level; compression leaves fewer


class LoadVolumesd(LoadImaged, ThreadUnsafe):
    """MONAI's LoadImaged for volumes, DICOM series and pictures as ``[C, H, W, S]``, and for threads that fill a cache.

    A single name stands for the subject that :func:`scripts.subjects.subject_of` finds, as MONAI Label names them.

    Its NIfTI reader keeps the names of the files that it is reading: with two threads, a volume of four modalities may
    come out with the one channel of another's label, without an error. Each thread gets a copy here. ``subject`` is
    noted in what is read, so that what is predicted from it can be named.

    Args:
        keys: keys of the files' names.
        modalities: names of the channels, in their order; none for a label map.

    Raises:
        InputError: naming the file that cannot be read, has other channels or lacks its siblings.
    """

    def __init__(self, keys: KeysCollection, modalities: Sequence[str] = ()) -> None:
        super().__init__(keys, ensure_channel_first=True)
        self.modalities = modalities
        self._loader.register(SeriesReader())
        self._loader.register(PictureReader(len(modalities) or 1))  # the last one is asked first

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.modalities and isinstance(d[key], str):
                item = subject_of(d[key], self.modalities)
                d |= {"subject": item["subject"], key: item["image"]}
        d = super().__call__(d, reader)
        for key in self.key_iterator(d):
            if d[key].ndim == 3:  # a flat NIfTI file
                d[key] = d[key].unsqueeze(-1)
                d[key].spatial_ndim = 3  # MONAI keeps the number that was read, and would invert to it
            d[key].meta["subject"] = d.get("subject", "")
        return d


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
    ``ConvertToMultiChannelBasedOnBratsClassesd`` knows BraTS alone and accepts any value. Values that JPEG compression
    has smeared are taken for the nearest known one, with a warning.

    Args:
        keys: keys of the label maps.
        regions: names of the wanted regions, in channel order, e.g. ``["TC", "WT", "ET"]``.
        region_labels: label values of every known region, e.g. ``{"WT": [1, 2, 4]}``.
        background_label: label value of what is in no region.

    Raises:
        InputError: for an unknown region, or (when called) a label value that belongs to no known region.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Sequence[str],
        region_labels: Mapping[str, Sequence[int]],
        background_label: int = 0,
    ) -> None:
        super().__init__(keys)
        check_regions(regions, region_labels, background_label)
        self.values = [list(region_labels[region]) for region in regions]
        self.known = sorted({background_label}.union(*map(set, region_labels.values())))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            label = d[key]
            meta = label.meta if isinstance(label, MetaTensor) else {}
            plain = torch.as_tensor(label)
            unknown = self._unknown(plain)
            if unknown and str(meta.get("filename_or_obj", "")).lower().endswith((".jpg", ".jpeg")):
                plain = self._unsmeared(plain)
                unknown = self._unknown(plain)
            if unknown:
                raise InputError(
                    f"subject '{d.get('subject', '?')}': the segmentation has label values {unknown[:5]} outside "
                    f"{self.known}; set 'region_labels' and 'background_label' (BraTS 2023 uses 3 for ET: add "
                    "configs/data_brats2023.yaml)"
                )
            regions = torch.cat([torch.isin(plain, plain.new_tensor(values)) for values in self.values]).float()
            d[key] = MetaTensor(regions, meta=meta) if isinstance(label, MetaTensor) else regions
        return d

    def _unknown(self, label: torch.Tensor) -> list[float]:
        return torch.unique(label[~torch.isin(label, label.new_tensor(self.known))]).tolist()

    def _unsmeared(self, label: torch.Tensor) -> torch.Tensor:
        """The nearest known value of each pixel; as it is where too many lie far from every known value."""
        known = label.new_tensor(self.known)
        nearest = known[torch.bucketize(label.contiguous(), (known[1:] + known[:-1]) / 2)]
        far = (label - nearest).abs() > known.diff().min() / 4
        if far.float().mean() > FAR_SHARE:
            return label
        warnings.warn(
            f"JPEG has smeared the masks' values: each is taken for the nearest of {self.known}", stacklevel=2
        )
        return nearest


class RegionsToLabeld(MapTransform):
    """Turn binary region channels back into one label map, the inverse of :class:`LabelToRegionsd`.

    ``[R, H, W, S]`` becomes ``[1, H, W, S]`` uint8. Large regions are painted first, so that the result is always
    nested (ET inside TC inside WT); each paints its first value that no smaller one has.

    Args:
        keys: keys of the region channels.
        regions: names of the channels.
        region_labels: label values of every region.
        background_label: what is painted where no region is.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Sequence[str],
        region_labels: Mapping[str, Sequence[int]],
        background_label: int = 0,
    ) -> None:
        super().__init__(keys)
        check_regions(regions, region_labels, background_label)
        self.background_label = background_label
        self.paint: list[tuple[int, int]] = []  # channel and value, in the order of painting
        order = sorted(range(len(regions)), key=lambda channel: -len(region_labels[regions[channel]]))
        for rank, channel in enumerate(order):
            smaller = {value for other in order[rank + 1 :] for value in region_labels[regions[other]]}
            values = region_labels[regions[channel]]
            self.paint.append((channel, next((v for v in values if v not in smaller), values[0])))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            regions = d[key]
            label = torch.full_like(regions[:1], self.background_label, dtype=torch.uint8)
            for channel, value in self.paint:
                label[0].masked_fill_(regions[channel] > 0, value)
            d[key] = label
        return d


def check_regions(regions: Sequence[str], region_labels: Mapping[str, Sequence[int]], background_label: int) -> None:
    """Raise InputError unless ``regions`` is a list of distinct names that ``region_labels`` defines, in 8 bits."""
    unknown = [region for region in regions if region not in region_labels]
    if isinstance(regions, str) or not regions or unknown or len(set(regions)) != len(regions):
        raise InputError(f"regions={regions!r} must be a list of distinct names from {list(region_labels)}")
    for region, values in region_labels.items():
        if not values or not set(values) <= set(range(256)) - {background_label}:
            raise InputError(
                f"region_labels: {region}={list(values)} must list whole numbers from 0 to 255 without "
                f"background_label={background_label}"
            )


class SliceIndicesd(MapTransform):
    """Add ``fg_indices`` and ``bg_indices`` for ``RandCropByPosNegLabeld``: one flat voxel index per axial slice.

    ``fg_indices`` holds the centre voxel of every slice of the label ``[R, H, W, S]`` with tumour, ``bg_indices``
    that of every other slice in which the image ``[M, H, W, S]`` shows brain (any non-zero voxel). Slices are
    then drawn evenly, whatever the tumour's area, and the whole volume is not searched anew for every crop. Where there
    are none of one kind, as in a picture, they are those of the other, which MONAI would draw too, with a warning.

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
            with_tumour, without = (
                (centre + torch.nonzero(slices).flatten()).numpy() for slices in (tumour, brain & ~tumour)
            )
            d["fg_indices"] = with_tumour if len(with_tumour) else without
            d["bg_indices"] = without if len(without) else with_tumour
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


class LikeInputWriter(NibabelWriter):
    """Writer of NIfTI for NIfTI and pictures for pictures; an interrupted write leaves no half of a file behind.

    Integers become a picture like the input (PNG for JPEG, which would smear them), other numbers TIFF of float32, one
    page per channel.
    """

    def set_data_array(self, data_array, channel_dim=0, squeeze_end_dims: bool = True, **kwargs) -> None:
        super().set_data_array(data_array, channel_dim, squeeze_end_dims=False, **kwargs)

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options) -> None:
        super().set_metadata(meta_dict, resample, **options)  # takes three axes without a channel for two
        if self.data_obj.shape[-1] == 1:  # the channel alone: a volume of one slice keeps its axes
            self.data_obj = self.data_obj[..., 0]
        self.source = Path((meta_dict or {}).get("filename_or_obj", ""))

    def write(self, filename, verbose: bool = False, **obj_kwargs) -> None:
        if is_picture(self.source):
            kind = ".tif"
            if np.issubdtype(self.output_dtype, np.integer):
                kind = self.source.suffix.lower().replace(".jpeg", ".png").replace(".jpg", ".png")
            write_picture(np.asarray(self.data_obj, self.output_dtype), str(filename).removesuffix(".nii.gz") + kind)
            return
        with atomic_path(filename) as path:
            super().write(path, verbose=verbose, **obj_kwargs)


def subject_name(metadict: Mapping, saver: object) -> dict:
    """``output_name_formatter`` of ``SaveImaged``, which takes off what looks like an extension."""
    return {"subject": f"{metadict['subject']}.nii", "idx": None}


def entropy_bits(prob: torch.Tensor) -> torch.Tensor:
    """Predictive entropy of a Bernoulli probability, in bits: 0 where sure, 1 at 0.5; any shape."""
    return torch.special.entr(prob).add(torch.special.entr(1 - prob)).div(float(np.log(2)))
