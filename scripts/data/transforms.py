"""Dictionary transforms that MONAI lacks: loading of all formats, voxel checks, slices, modality dropout."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform, RandomizableTransform, Resized, ThreadUnsafe

from scripts.config import InputError
from scripts.data.dicom import SeriesReader
from scripts.data.pictures import PictureReader, is_picture
from scripts.data.subjects import subject_of

logger = logging.getLogger(__name__)

NORMALISATIONS = ("nonzero", "all", "foreground")
IQR_OF_NORMAL = 1.349  # interquartile range of normal values with a standard deviation of 1
SEPARATOR = ";"  # between the names of modalities, which may hold spaces
NO_AIR = -500  # HU; a CT has darker voxels, an image of another kind or raw values do not


class LoadVolumesd(LoadImaged, ThreadUnsafe):
    """MONAI's LoadImaged that reads volumes, DICOM series and pictures as ``[C, H, W, S]`` and is safe with threads.

    MONAI's NIfTI reader stores the names of the files that it is reading. If two threads share it, an image of four
    modalities can get the single channel of another subject's label without an error. ``ThreadUnsafe`` therefore gives
    each thread a copy of this transform.

    A single file name, which MONAI Label gives, is replaced by the files of its subject
    (:func:`scripts.data.subjects.subject_of`). The metadata holds the name of the subject, by which outputs are named,
    and the names of the channels.

    Args:
        keys: keys of the file names.
        modalities: names of the channels in channel order; empty for a label map.

    Raises:
        InputError: if a file cannot be read, has other channels, or lacks the files of other modalities beside it.
    """

    def __init__(self, keys: KeysCollection, modalities: Sequence[str] = ()) -> None:
        super().__init__(keys, ensure_channel_first=True)
        self.modalities = modalities
        self._loader.register(SeriesReader())
        self._loader.register(PictureReader(len(modalities) or 1))  # MONAI tries the last registered reader first

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.modalities and isinstance(d[key], str):
                item = subject_of(d[key], self.modalities)
                d |= {"subject": item["subject"], key: item["image"]}
        d = super().__call__(d, reader)
        for key in self.key_iterator(d):
            if d[key].ndim == 3:  # a 2D NIfTI file
                d[key] = d[key].unsqueeze(-1)
                d[key].spatial_ndim = 3  # otherwise MONAI would invert the transforms to 2D
            d[key].meta |= {"subject": d.get("subject", ""), "modalities": list(self.modalities)}
        return d


class CheckVolumed(MapTransform):
    """Refuse volumes that would spoil training: NaN or infinite voxels, or a modality with a single value.

    Each key holds ``[M, H, W, S]``, one channel per modality.

    Raises:
        InputError: naming the subject and the modality.
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


class CompleteModalitiesd(MapTransform):
    """Give a volume the channels of the network: ``[m, H, W, S]`` to ``[M, H, W, S]``, absent modalities are 0.

    The key ``modalities`` names those that are there. A modality that is identical to a later one of the network gives
    a warning: some data sets replace what is missing by a copy. It counts as absent if modalities may be absent.

    Args:
        keys: keys of volumes of :class:`LoadVolumesd`.
        settings: of the network; its ``modalities``, which may be absent if its ``modality_dropout`` is above 0.

    Raises:
        InputError: for a modality that the network does not know, or one that is absent and may not be.
    """

    def __init__(self, keys: KeysCollection, settings: Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.expected, self.may_be_absent = list(settings["modalities"]), settings["modality_dropout"] > 0

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d: dict = dict(data)
        for key in self.key_iterator(d):
            given = dict(zip(d[key].meta["modalities"], d[key], strict=True))
            check_modalities(list(given), self.expected, self.may_be_absent)
            volumes = {name: given[name] for name in self.expected if name in given}
            present = [name for name in volumes if name not in self._left_out(d, key, volumes)]
            d["modalities"] = SEPARATOR.join(present)
            if not present == self.expected == list(given):
                nothing = torch.zeros_like(d[key][0])
                found = torch.stack([volumes[name] if name in present else nothing for name in self.expected])
                d[key] = MetaTensor(found, meta=d[key].meta, applied_operations=d[key].applied_operations)
        return d

    def _left_out(self, d: Mapping[str, Any], key: str, volumes: Mapping[str, torch.Tensor]) -> set[str]:
        """Copies of other modalities that count as absent. Grey pictures, often saved in colour, have none."""
        if is_picture(str(d[key].meta.get("filename_or_obj", ""))):
            return set()
        pairs = itertools.combinations(volumes.items(), 2)
        copies = {name for (name, first), (_, later) in pairs if torch.equal(first, later)}
        for name in sorted(copies):
            logger.warning(
                f"subject '{d.get('subject', '?')}': {name} is a copy of another modality and "
                + ("is left out" if self.may_be_absent else "may be missing; the mask may be wrong")
            )
        return copies if self.may_be_absent else set()


def check_modalities(given: Sequence[str], expected: Sequence[str], may_be_absent: bool) -> list[str]:
    """The ``expected`` modalities that are not ``given``.

    Raises:
        InputError: for a modality that is not expected, or one that is absent and may not be.
    """
    if unknown := [name for name in given if name not in expected]:
        raise InputError(f"modalities {unknown} are not among those of the network, {list(expected)}")
    absent = [name for name in expected if name not in given]
    if absent and not may_be_absent:
        raise InputError(
            f"modalities={list(given)} lacks {absent}: the network was not trained for that. Add these files, or use "
            "weights that were trained with modality_dropout"
        )
    return absent


class CheckHounsfieldd(MapTransform):
    """Warn about a volume without air: it is no CT in Hounsfield units, and the result would be wrong."""

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        for key in self.key_iterator(dict(data)):
            if (darkest := float(data[key].min())) > NO_AIR:
                logger.warning(
                    f"subject '{data.get('subject', '?')}': the darkest voxel is {darkest:g}; a CT in Hounsfield units "
                    f"has air below {NO_AIR}. MR images and raw values give wrong results"
                )
        return dict(data)


class NormaliseModalitiesd(MapTransform):
    """Normalise each channel of a volume ``[M, ...]``; see :func:`normalised`. An empty channel stays as it is.

    Args:
        keys: keys of volumes.
        normalisation: one of :data:`NORMALISATIONS`.
    """

    def __init__(self, keys: KeysCollection, normalisation: str) -> None:
        super().__init__(keys)
        self.normalisation = normalisation

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key].float().clone()  # what came in stays
            for channel, values in enumerate(volume):
                volume[channel] = normalised(values, values, self.normalisation)
            result[key] = volume
        return result


def normalised(image: torch.Tensor, volume: torch.Tensor, normalisation: str) -> torch.Tensor:
    """The image ``[...]`` of a modality, normalised with the statistics of the whole volume ``[...]``.

    ``nonzero`` gives z-scores of the voxels that are not 0, which stay 0, and ``all`` of all voxels. ``foreground``
    subtracts the median of the voxels above the mean of the volume, and divides by their interquartile range and 1.349,
    so that normal values get a standard deviation of 1. Air and a bright scalp hardly change it: heads with and without
    a skull get a similar contrast.

    Args:
        image: to be normalised: the volume, or slices of it.
        volume: of the modality.
        normalisation: one of :data:`NORMALISATIONS`.

    Raises:
        InputError: for another one.
    """
    if normalisation not in NORMALISATIONS:
        raise InputError(f"normalisation='{normalisation}' is not one of {list(NORMALISATIONS)}")
    if normalisation == "foreground":
        values = volume[volume > volume.mean()]
    else:
        values = volume[volume != 0] if normalisation == "nonzero" else volume
    if not values.numel():
        return image
    if normalisation == "foreground":
        low, centre, high = np.percentile(np.asarray(values), (25, 50, 75)).tolist()
        scale = (high - low) / IQR_OF_NORMAL or float(values.std(unbiased=False))  # most voxels may be alike
    else:
        centre, scale = float(values.mean()), float(values.std(unbiased=False))
    scaled = (image - centre) / (scale or 1.0)
    return torch.where(image != 0, scaled, 0) if normalisation == "nonzero" else scaled


class SliceIndicesd(MapTransform):
    """Add ``fg_indices`` and ``bg_indices`` for ``RandCropByPosNegLabeld``: one flat voxel index per axial slice.

    ``empty`` says whether the whole label is empty, as that of a healthy subject is.

    ``fg_indices`` holds the centre voxel of every slice with foreground in the label ``[R, H, W, S]``. ``bg_indices``
    holds the centre voxel of every other slice in which the image ``[M, H, W, S]`` has a non-zero voxel. Each slice of
    a kind is then equally likely, whatever the area of its foreground, and MONAI need not search the whole volume for
    every crop. If a volume has slices of one kind only, as a picture has, both keys hold these slices: MONAI would draw
    the same ones, with a warning.

    With a ``window``, windows are drawn instead of slices: ``fg_indices`` are the voxels with foreground, and
    ``bg_indices`` others on a grid of an eighth of the window. Each of them can become the centre of a window, so that
    a large lesion is drawn more often than a small one.

    Args:
        keys: the label's key.
        image_key: the image's key.
        window: side of the windows (pixels); None draws whole slices.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", window: int | None = None) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.window = window

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d: dict = dict(data)
        for key in self.key_iterator(d):
            label, image = torch.as_tensor(d[key]).any(dim=0), (torch.as_tensor(d[self.image_key]) != 0).any(dim=0)
            voxels = torch.arange(label.numel(), dtype=torch.int32).view(label.shape)
            if self.window is None:
                voxels = voxels[label.shape[0] // 2, label.shape[1] // 2]
                label, image = (mask.flatten(0, 1).any(dim=0) for mask in (label, image))
            else:
                grid = torch.zeros_like(label)
                step = max(1, self.window // 8)
                grid[::step, ::step] = True
                image &= grid
            foreground, background = (voxels[found].numpy() for found in (label, image & ~label))
            d["empty"] = not torch.as_tensor(d[key]).any()
            d["fg_indices"] = foreground if len(foreground) else background
            d["bg_indices"] = background if len(background) else foreground
        return d


class ResizeSlicesd(Resized):
    """MONAI's Resized in the plane of the slices, with torch's anti-aliasing instead of its own.

    MONAI's anti-aliasing blurs in three dimensions by unfolded convolutions: a volume of 240 x 240 x 155 voxels with
    four modalities takes 5.5 GB at 32 px (docs/monai_traps.md). It records the transform, so that it is inverted as
    before.

    Args:
        keys: keys of volumes ``[C, H, W, S]``.
        size: both sides of the slices (pixels).
        mode: ``trilinear``, which is anti-aliased, or ``nearest-exact`` for masks.
    """

    def __init__(self, keys: KeysCollection, size: int, mode: Sequence[str] | str = "trilinear") -> None:
        super().__init__(keys, spatial_size=(size, size, -1), mode=mode)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict:
        d = super().__call__(data, lazy)
        for key, mode in self.key_iterator(d, self.mode):
            if mode == "trilinear" and d[key].shape != data[key].shape:
                slices = torch.as_tensor(data[key]).movedim(-1, 0)
                size = d[key].shape[1:3]
                smooth = torch.nn.functional.interpolate(slices, size, mode="bilinear", antialias=True)
                d[key].copy_(smooth.movedim(0, -1))
        return d


class RandModalityDropoutd(RandomizableTransform, MapTransform):
    """Set random modalities of ``[M, H, W]`` to zero (the mean of their z-scores), as if they were missing.

    From one to all but one of those that are there are dropped, each number as often. Those that are absent are set to
    zero again, because augmentations may have changed them.

    Args:
        keys: keys of the images.
        settings: of the network; the names of its ``modalities``, and the probability ``modality_dropout``.
    """

    def __init__(self, keys: KeysCollection, settings: Mapping[str, Any]) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, settings["modality_dropout"])
        self.names = list(settings["modalities"])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d: dict = dict(data)
        self.randomize(None)
        there = d["modalities"].split(SEPARATOR) if "modalities" in d else self.names
        present = [index for index, name in enumerate(self.names) if name in there]
        for key in self.key_iterator(d):
            kept = present
            if self._do_transform and len(present) > 1:
                kept = self.R.permutation(present)[self.R.randint(1, len(present)) :].tolist()
            if dropped := [index for index in range(len(self.names)) if index not in kept]:
                d[key] = d[key].clone()
                d[key][dropped] = 0
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
