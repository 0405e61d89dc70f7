"""Dictionary transforms that MONAI lacks: loading of all formats, voxel checks, slices, modality dropout."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform, RandomizableTransform, Resized, ThreadUnsafe

from scripts.config import InputError
from scripts.data.dicom import SeriesReader
from scripts.data.pictures import PictureReader, is_picture
from scripts.data.subjects import subject_of

logger = logging.getLogger(__name__)

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

    The key ``modalities`` names those that are there. A modality that is identical to a later one gives a warning: some
    data sets replace what is missing by a copy.

    Args:
        keys: keys of volumes of :class:`LoadVolumesd`.
        expected: names of the channels of the network.
        leave_out_copies: a modality that is identical to a later one counts as absent.
    """

    def __init__(self, keys: KeysCollection, expected: Sequence[str], leave_out_copies: bool) -> None:
        super().__init__(keys)
        self.expected, self.leave_out_copies = list(expected), leave_out_copies

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        d: dict = dict(data)
        for key in self.key_iterator(d):
            volumes = dict(zip(d[key].meta["modalities"], d[key], strict=True))
            picture = is_picture(str(d[key].meta.get("filename_or_obj", "")))
            copies = [] if picture else _copies(volumes)  # grey pictures are often saved in colour
            for name in copies:
                logger.warning(
                    f"subject '{d.get('subject', '?')}': {name} is a copy of another modality and "
                    + ("is left out" if self.leave_out_copies else "may be missing; the mask may be wrong")
                )
            present = [name for name in volumes if not (self.leave_out_copies and name in copies)]
            d["modalities"] = " ".join(present)
            if present != self.expected:
                nothing = torch.zeros_like(d[key][0])
                found = torch.stack([volumes[name] if name in present else nothing for name in self.expected])
                d[key] = MetaTensor(found, meta=d[key].meta, applied_operations=d[key].applied_operations)
        return d


def _copies(volumes: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the volumes that are identical to a later one."""
    pairs = itertools.combinations(volumes.items(), 2)
    return [name for (name, first), (_, later) in pairs if torch.equal(first, later)]


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

    From one to all but one are dropped, each number as often.

    Args:
        keys: keys of the images.
        prob: probability of the dropout.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.1) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        d = dict(data)
        self.randomize(None)
        for key in self.key_iterator(d):
            if self._do_transform and (count := len(d[key])) > 1:
                d[key] = d[key].clone()
                d[key][self.R.permutation(count)[: self.R.randint(1, count)]] = 0
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
