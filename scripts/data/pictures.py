"""Pictures (PNG, JPEG, BMP, TIFF) as volumes of one slice: find them and their masks, check, read and write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
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
EXTENSION = re.compile(r"\.(png|jpe?g|bmp|tiff?|nii(\.gz)?)$", re.IGNORECASE)
MASK_ENDINGS = ("", "_mask", "_seg", "_segmentation")
GREY_MODES = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I", "F")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA")  # the pixels may still all be grey
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # axes point left and back, so that overlays show a picture upright
EXIF_ORIENTATION = 0x0112


class Grid(NamedTuple):
    """Shape ``(H, W, S)``, affine and number of channels of a file. A picture in a colour mode has 3 channels."""

    shape: tuple[int, ...]
    affine: np.ndarray
    channels: int = 1


def is_picture(file: str | Path) -> bool:
    """Whether the file name has the extension of a picture."""
    return Path(file).suffix.lower() in PICTURES


def file_stem(file: str | Path) -> str:
    """File name without folder and extension; ``.nii.gz`` is one extension."""
    return EXTENSION.sub("", Path(file).name)


def find_images(
    dataset_dir: str, image_dir: str, mask_dir: str | None, mask_names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Items of a folder of images. Each image is a subject with the file stem as its name.

    If ``mask_dir`` is given, each item has a mask. The mask of ``7.jpg`` is called ``7``, ``7_mask``, ``7_seg`` or
    ``7_segmentation``, with any supported extension. Masks of further lesions have a number, such as ``7_mask_1`` and
    ``7_mask_2``; the label is then the list of all, which are united. With ``mask_names``, the label is the list of
    ``7_<name>``, one for each name.

    Raises:
        InputError: if a folder is missing or empty, two files have the same stem, or an image lacks a mask.
    """
    images = _by_stem(Path(dataset_dir, image_dir), "image_dir")
    items: list[dict[str, Any]] = [{"subject": name, "image": [str(file)]} for name, file in images.items()]
    if mask_dir is None:
        return items
    if Path(dataset_dir, image_dir).resolve() == Path(dataset_dir, mask_dir).resolve():
        raise InputError(f"image_dir and mask_dir are both '{mask_dir}': put images and masks into different folders")
    masks = _by_stem(Path(dataset_dir, mask_dir), "mask_dir")
    for item in items:
        item["label"] = [str(file) for file in _pop_masks(item["subject"], masks, mask_names)]
    if unmasked := [item["subject"] for item in items if not item["label"]]:
        names = f" called <image>_<name> for each name of {list(mask_names)}" if mask_names else ""
        raise InputError(
            f"{len(unmasked)} of {len(items)} images in {image_dir} have no mask{names} in "
            f"{Path(dataset_dir, mask_dir)}: {unmasked[:5]}; add the masks, or remove the images"
        )
    warn_some(f"masks in {mask_dir} without an image are left out", sorted(masks))
    return items


def _pop_masks(subject: str, masks: dict[str, Path], mask_names: Sequence[str]) -> list[Path]:
    """Remove the masks of an image from those that are left, and return them; empty if one is missing."""
    if mask_names:
        stems = [f"{subject}_{name}" for name in mask_names]
        return [masks.pop(stem) for stem in stems] if set(stems) <= set(masks) else []
    found = [masks.pop(subject + end) for end in MASK_ENDINGS if subject + end in masks]
    if len(found) > 1:
        raise InputError(f"image '{subject}' has several masks: {[file.name for file in found]}; keep one")
    further = re.compile(re.escape(subject) + r"(_mask|_seg|_segmentation)_\d+")
    return found + [masks.pop(stem) for stem in [stem for stem in masks if further.fullmatch(stem)]]


def _by_stem(folder: Path, key: str) -> dict[str, Path]:
    """Images or masks of a folder by file stem, sorted."""
    if not folder.is_dir():
        raise InputError(f"{key}: '{folder}' is not a folder")
    names = by_stem([path.name for path in folder.iterdir()], f"{key}: '{folder}'")
    return {stem: folder / name for stem, name in names.items()}


def by_stem(names: Iterable[str], folder: str) -> dict[str, str]:
    """Names of images by their stem, sorted.

    Args:
        names: of files; those that are no images, or hidden, are left out.
        folder: for the message.

    Raises:
        InputError: if two have the same stem, or there is none.
    """
    found: dict[str, str] = {}
    for name in sorted(name for name in names if not name.startswith(".")):
        stem, is_image = EXTENSION.subn("", name)
        if is_image and stem in found:
            raise InputError(f"{folder} has both {found[stem]} and {name}; keep one")
        if is_image:
            found[stem] = name
    if not found:
        raise InputError(f"{folder} has no file with extension {', '.join(PICTURES)}, .nii or .nii.gz")
    return found


def check_channels(item: dict[str, Any], modalities: Sequence[str]) -> None:
    """Raise InputError unless the picture of an item can have one channel per modality. Only the header is read."""
    (file,) = item["image"]
    if not is_picture(file):  # check_headers compares the number of volumes
        return
    if len(modalities) not in (1, 3):
        raise InputError(f"modalities={list(modalities)} must be [grey] or [red, green, blue] for pictures")
    if read_grid(file).channels < len(modalities):
        raise InputError(f"{file} is grey, but modalities={list(modalities)}: set modalities to [grey]")


def read_grid(file: str) -> Grid:
    """Grid of a picture, a DICOM series (given by one of its files) or a NIfTI volume. Only headers are read.

    Raises:
        InputError: if the file cannot be read, or a NIfTI volume does not have 2, 3 or 4 dimensions.
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
    if header.get_data_dtype().kind not in "iuf":
        raise InputError(f"{file} holds {header.get_data_dtype()}, not real numbers; save it as integers or floats")
    if len(header.shape) not in (2, 3, 4):
        raise InputError(f"{file} has shape {header.shape}; give a 3D volume, or a 4D volume that holds all modalities")
    return Grid((*header.shape, 1)[:3], header.affine, (*header.shape, 1, 1)[3])


def read_volume(file: str) -> np.ndarray:
    """Stored values ``[H, W, S]`` of the first channel of a file, or of its DICOM series."""
    if is_picture(file):
        return read_picture(file)[0]
    if is_dicom(file):
        return itk.array_from_image(read_series(file)).T
    volume = np.atleast_3d(nib.Nifti1Image.from_filename(file).get_fdata(dtype=np.float32))
    return volume.reshape(*volume.shape[:3], -1)[..., 0]


def read_picture(file: str, channels: int | None = None) -> np.ndarray:
    """Read a picture as float32 ``[C, W, H, 1]`` at its full bit depth.

    Palette colours become RGB and an opaque alpha channel is dropped. If ``channels`` is 1, an RGB picture whose three
    channels are equal becomes one channel.

    Args:
        file: the picture.
        channels: number of channels C, 1 or 3; None takes what the picture has.

    Raises:
        InputError: if the picture cannot be read, has a transparent pixel or does not have ``channels`` channels.
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
    """Open a picture and check its header, without decoding the pixels. Raises InputError."""
    try:
        image = Image.open(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    with image:
        if image.mode not in GREY_MODES + COLOUR_MODES:
            raise InputError(f"{file} has colour mode {image.mode}; save it as greyscale or RGB")
        if (pages := getattr(image, "n_frames", 1)) > 1:
            raise InputError(f"{file} has {pages} pages; save each page as its own file, or a volume as NIfTI")
        if image.format == "JPEG" and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            raise InputError(f"{file} has an EXIF orientation; save it with upright pixels, like its mask")
        yield image


def write_picture(volume: np.ndarray, file: str | Path) -> None:
    """Write ``[W, H, 1]`` or ``[W, H, 1, R]`` of uint8 or float32 in one step. Several regions are pages of a TIFF."""
    arrays = np.asarray(volume).reshape(*volume.shape[:2], -1).transpose(2, 1, 0)
    pages = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
    with atomic_path(file) as path:
        pages[0].save(path, save_all=len(pages) > 1, append_images=pages[1:])


class PictureReader(ImageReader):
    """MONAI reader around :func:`read_picture`. MONAI's PILReader has no TIFF, affine or slice axis.

    Args:
        channels: number of channels that each file must have, 1 or 3.
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
