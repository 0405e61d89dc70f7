"""Pictures as volumes of one slice: found with their masks, checked by their headers, read and written by Pillow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import itk
import nibabel as nib
import numpy as np
from monai.data import ImageReader
from monai.utils import ensure_tuple
from PIL import Image

from scripts.config import InputError, atomic_path, warn_some
from scripts.data.dicom import is_dicom, read_series, series_grid

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
KNOWN = re.compile(r"\.(png|jpe?g|bmp|tiff?|nii(\.gz)?)$", re.IGNORECASE)
MASK_ENDINGS = ("", "_mask", "_seg", "_segmentation")
GREY_MODES = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I", "F")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA")  # which may hold nothing but grey
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # first axis to the left, second to the back: overlays show a picture upright
EXIF_ORIENTATION = 0x0112


class Grid(NamedTuple):
    """Shape ``(H, W, S)`` of a file, its affine, and its channels: volumes of NIfTI, what a picture may have."""

    shape: tuple[int, ...]
    affine: np.ndarray
    channels: int = 1


def is_picture(file: str | Path) -> bool:
    """Whether the name is that of a picture rather than a NIfTI volume."""
    return Path(file).suffix.lower() in PICTURES


def file_stem(file: str | Path) -> str:
    """Name without folder and known extension, ``.nii.gz`` included."""
    return KNOWN.sub("", Path(file).name)


def find_images(dataset_dir: str, image_dir: str, mask_dir: str | None) -> list[dict[str, Any]]:
    """Items of a folder of images, each a subject named by its stem, with its mask where ``mask_dir`` is given.

    The mask of ``7.jpg`` is called ``7``, ``7_mask``, ``7_seg`` or ``7_segmentation``, with any known extension.

    Raises:
        InputError: for a folder that is absent or empty, a stem that is there twice, an image without its mask.
    """
    images = _by_stem(Path(dataset_dir, image_dir), "image_dir")
    items: list[dict[str, Any]] = [{"subject": name, "image": [str(file)]} for name, file in images.items()]
    if mask_dir is None:
        return items
    if Path(dataset_dir, image_dir).resolve() == Path(dataset_dir, mask_dir).resolve():
        raise InputError(f"image_dir and mask_dir are both '{mask_dir}': put images and masks into different folders")
    masks = _by_stem(Path(dataset_dir, mask_dir), "mask_dir")
    without: list[str] = []
    for item in items:
        found = [masks.pop(item["subject"] + end) for end in MASK_ENDINGS if item["subject"] + end in masks]
        if len(found) > 1:
            raise InputError(f"image '{item['subject']}' has several masks: {[file.name for file in found]}; keep one")
        if found:
            item["label"] = str(found[0])
        else:
            without.append(item["subject"])
    if without:
        raise InputError(
            f"{len(without)} of {len(items)} images in {image_dir} have no mask in {Path(dataset_dir, mask_dir)}: "
            f"{without[:5]}; add them, or remove the images"
        )
    warn_some(f"masks in {mask_dir} without an image are left out", sorted(masks))
    return items


def _by_stem(folder: Path, key: str) -> dict[str, Path]:
    """Images or masks of a folder, sorted, by name without extension."""
    if not folder.is_dir():
        raise InputError(f"{key}: '{folder}' is not a folder")
    found: dict[str, Path] = {}
    for file in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        stem, known = KNOWN.subn("", file.name)
        if known and stem in found:
            raise InputError(f"{key}: {folder} has both {found[stem].name} and {file.name}; keep one")
        if known:
            found[stem] = file
    if not found:
        raise InputError(f"{key}: '{folder}' is empty, or without {', '.join(PICTURES)}, .nii or .nii.gz")
    return found


def check_channels(item: dict[str, Any], modalities: Sequence[str]) -> None:
    """Raise InputError unless the image of an item, by its header, can have one channel for each of ``modalities``."""
    (file,) = item["image"]
    if not is_picture(file):  # checked with the grid
        return
    if len(modalities) not in (1, 3):
        raise InputError(f"modalities={list(modalities)} must be [grey] or [red, green, blue] for pictures")
    if read_grid(file).channels < len(modalities):
        raise InputError(f"{file} is grey, but modalities={list(modalities)}: set modalities to [grey]")


def read_grid(file: str) -> Grid:
    """Grid of a picture, DICOM series (by one of its files) or NIfTI volume; only headers are read.

    Raises:
        InputError: when it cannot be read or holds anything but a slice, a volume or a row of volumes.
    """
    if is_picture(file):
        with _opened(file) as image:
            return Grid((*image.size, 1), AFFINE, 3 if image.mode in COLOUR_MODES else 1)
    if is_dicom(file):
        return Grid(*series_grid(file))
    try:
        header = nib.Nifti1Image.from_filename(file)
    except Exception as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if len(header.shape) not in (2, 3, 4):
        raise InputError(f"{file} has shape {header.shape}, expected one 3D volume, or one 4D for all modalities")
    return Grid((*header.shape, 1)[:3], header.affine, (*header.shape, 1, 1)[3])


def read_volume(file: str) -> np.ndarray:
    """First channel of a file, or its DICOM series, as it is stored, ``[H, W, S]``."""
    if is_picture(file):
        return read_picture(file)[0]
    if is_dicom(file):
        return itk.array_from_image(read_series(file)).T
    volume = np.atleast_3d(nib.Nifti1Image.from_filename(file).get_fdata(dtype=np.float32))
    return volume.reshape(*volume.shape[:3], -1)[..., 0]


def read_picture(file: str, channels: int | None = None) -> np.ndarray:
    """A picture as ``[C, W, H, 1]`` at its full depth, C = ``channels`` where that is given (1 or 3).

    Palettes become their colours, an opaque alpha channel is dropped, and colours that are all grey become one channel
    where one is asked for.

    Raises:
        InputError: when it cannot be read, is transparent anywhere, or has other channels than asked for.
    """
    with _opened(file) as image:
        try:
            image.load()
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema() != (255, 255):
                    raise InputError(f"{file} is transparent in places; save it without an alpha channel")
            if image.mode in COLOUR_MODES or image.mode == "1":
                image = image.convert("L" if image.mode == "1" else "RGB")
            pixels = np.atleast_3d(np.asarray(image, np.float32))
        except (OSError, SyntaxError, ValueError) as error:
            raise error if isinstance(error, InputError) else InputError(f"cannot read {file}: {error}") from error
    if channels == 1 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    if channels not in (None, pixels.shape[-1]):
        raise InputError(
            f"{file} has colours where one grey channel is expected: save masks as greyscale, and set modalities to "
            "[red, green, blue] for colour images"
            if channels == 1
            else f"{file} is grey, but {channels} channels are expected: set modalities to [grey]"
        )
    return pixels.transpose(2, 1, 0)[..., None]


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A picture whose header is fit, not yet decoded."""
    try:
        image = Image.open(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    with image:
        if image.mode not in GREY_MODES + COLOUR_MODES:
            raise InputError(f"{file} is of colour mode {image.mode}; save it as greyscale or RGB")
        if (pages := getattr(image, "n_frames", 1)) > 1:
            raise InputError(f"{file} has {pages} pages; save each as a file, or a volume as NIfTI")
        if image.format == "JPEG" and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            raise InputError(f"{file} is to be turned by its EXIF orientation; save it upright, as its mask is")
        yield image


def write_picture(volume: np.ndarray, file: str | Path) -> None:
    """Write ``[W, H, 1]`` or ``[W, H, 1, R]`` of uint8 or float32, in one step; regions as pages of a TIFF."""
    pages = np.asarray(volume).reshape(*volume.shape[:2], -1).transpose(2, 1, 0)
    first, *others = [Image.fromarray(np.ascontiguousarray(page)) for page in pages]
    with atomic_path(file) as path:
        first.save(path, save_all=bool(others), append_images=others)


class PictureReader(ImageReader):
    """MONAI reader of pictures, as :func:`read_picture` has them; MONAI's own knows no TIFF, affine or slice axis.

    Args:
        channels: how many each file must have, 1 or 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def verify_suffix(self, filename: Any) -> bool:
        return all(is_picture(name) for name in ensure_tuple(filename))

    def read(self, data: Any, **kwargs: Any) -> list[np.ndarray]:
        return [read_picture(name, self.channels) for name in ensure_tuple(data)]

    def get_data(self, img: Sequence[np.ndarray]) -> tuple[np.ndarray, dict]:
        pixels = np.concatenate(img)
        shape = np.asarray(pixels.shape[1:])
        return pixels, {"affine": AFFINE, "original_affine": AFFINE, "spatial_shape": shape, "original_channel_dim": 0}
