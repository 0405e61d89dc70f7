"""Dictionary transforms that MONAI lacks: safe loading, checks, slice indices, modality dropout."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import LoadImaged, MapTransform, RandomizableTransform, ThreadUnsafe

from scripts.config import InputError
from scripts.data.dicom import SeriesReader
from scripts.data.pictures import PictureReader
from scripts.data.subjects import subject_of


class LoadVolumesd(LoadImaged, ThreadUnsafe):
    """MONAI's LoadImaged for volumes, DICOM series and pictures as ``[C, H, W, S]``, and for threads that fill a cache.

    A single name stands for the subject that :func:`scripts.data.subjects.subject_of` finds, as MONAI Label names them.

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
