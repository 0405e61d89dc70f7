"""DICOM series as volumes: find them in a subject's folder, check their headers, read them with MONAI's ITK reader.

A series is given by the path of one of its files. The other files of the series are those in the same folder with the
same SeriesInstanceUID.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import itk
import numpy as np
from monai.data import ITKReader
from monai.data.utils import orientation_ras_lps
from monai.utils import ensure_tuple

from scripts.config import InputError, warn_some

SERIES_UID, STUDY_UID, DESCRIPTION = "0020|000e", "0020|000d", "0008|103e"
# SOP class (0002,0002) of CT, MR and PET images: tells a damaged image from a file without an image, as ITK cannot
IMAGE_CLASS = re.compile(rb"\x02\x00\x02\x00UI..1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2|4|128)\x00", re.DOTALL)
SAME_ORIENTATION = 1e-3  # tolerance of direction cosines, and of the pixel spacing in mm
SAME_POSITION = 0.01  # mm; slices that are closer than this have one position
UNEVEN = 0.05  # tolerance of slice distances, relative to the median distance: scanners round positions


class Slice(NamedTuple):
    """Header of one image in DICOM's coordinates (left, back, head). Column n of ``direction`` is image axis n."""

    file: str
    series: str
    study: str
    description: str
    size: tuple[int, ...]
    spacing: np.ndarray
    direction: np.ndarray
    origin: np.ndarray


Series = list[Slice]


def is_dicom(file: str | Path) -> bool:
    """Whether the file starts with the DICOM preamble. Its name does not matter."""
    try:
        with Path(file).open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(folder: Path) -> list[Series]:
    """All series below a folder. Each is a list of the images in one folder, not sorted by position."""
    series: dict[tuple[Path, str], Series] = {}
    for file in _files(folder):
        if image := _read_slice(file):
            series.setdefault((file.parent, image.series), []).append(image)
    return list(series.values())


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _read_slice(file: Path) -> Slice | None:
    return _read_header(str(file), file.stat().st_mtime_ns) if is_dicom(file) else None


@functools.lru_cache(maxsize=8192)
def _read_header(file: str, mtime_ns: int) -> Slice | None:
    """Header of a DICOM image; None if the file holds no image (DICOMDIR, report). ``mtime_ns`` is for the cache."""
    reader = itk.GDCMImageIO.New(FileName=file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        with Path(file).open("rb") as stream:
            if IMAGE_CLASS.search(stream.read(1024)):
                raise InputError(
                    f"cannot read the DICOM image {file}: it is damaged or its transfer syntax is not supported; "
                    "export it again"
                ) from error
        return None
    tags = reader.GetMetaDataDictionary()
    series, study, description = (
        tags[key].strip() if tags.HasKey(key) else "" for key in (SERIES_UID, STUDY_UID, DESCRIPTION)
    )
    axes = range(3)
    spacing, origin = (np.array([get(axis) for axis in axes]) for get in (reader.GetSpacing, reader.GetOrigin))
    direction = np.transpose([reader.GetDirection(axis) for axis in axes])
    size = tuple(reader.GetDimensions(axis) for axis in axes)
    return Slice(file, series, study, description, size, spacing, direction, origin)


def share_study(folders: Collection[Sequence[Series]]) -> bool:
    """Whether two of the folders hold series of the same study. They are then parts of one subject."""
    studies = [study for found in folders for study in {image.study for series in found for image in series}]
    return len(studies) > len(set(studies))


def series_item(folder: Path, series: Sequence[Series], modalities: Sequence[str]) -> dict[str, Any]:
    """Item of a subject's folder: for each modality, the path of one file of its series.

    A series belongs to a modality if the name of one of its sub-folders ends in the modality's suffix. If no folder
    does, the series description must end in it. A single series belongs to a single modality whatever its name.

    Raises:
        InputError: if a modality has no series or several. The message names the subject and the modality.
    """
    images = []
    for modality in modalities:
        found = _of_modality(folder, series, modality) or (series if len(series) == len(modalities) == 1 else [])
        if len(found) != 1:
            raise InputError(
                f"subject '{folder.name}': {'several' if found else 'no'} DICOM series for modality '{modality}' among "
                f"{[describe(s) for s in found or series]} in {folder}; rename the folder of one series so that it "
                f"ends in _{modality}, or set 'modalities'"
            )
        images.append(found[0][0].file)
    image_files = {Path(image.file) for one in series for image in one}
    other_files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in image_files]
    warn_some(
        f"files in {folder} are not DICOM images and are left out",
        [str(path.relative_to(folder)) for path in other_files],
    )
    return {"subject": folder.name, "image": images}


def _of_modality(folder: Path, series: Sequence[Series], modality: str) -> list[Series]:
    ending = re.compile(rf"(^|[-_. ]){re.escape(modality)}$", re.IGNORECASE)

    def folder_matches(one: Series) -> bool:
        return any(ending.search(part) for part in Path(one[0].file).relative_to(folder).parent.parts)

    by_folder = [one for one in series if folder_matches(one)]
    return by_folder or [one for one in series if ending.search(one[0].description)]


def describe(series: Series) -> str:
    """Text for messages: folder, description and number of images of a series."""
    return f"{Path(series[0].file).parent.name}: '{series[0].description}' ({len(series)} images)"


def ordered_series(file: str) -> Series:
    """All images of the series of ``file``, sorted by position along the slice normal.

    Raises:
        InputError: if they are not the evenly spaced slices of one volume. The message names the series and the file
            or the position.
    """
    images = [image for path in _files(Path(file).parent) if (image := _read_slice(path))]
    given = [image for image in images if image.file == str(Path(file))]
    if not given:
        raise InputError(f"cannot read the DICOM image {file}")
    series = [image for image in images if image.series == given[0].series]
    return _in_order([image for image in series if Path(image.file).parent == Path(file).parent])


def _in_order(series: Series) -> Series:
    where, first = f"DICOM series {describe(series)} in {Path(series[0].file).parent}", series[0]
    for image in series:
        if image.size[2] > 1:
            raise InputError(f"{where}: {image.file} holds {image.size[2]} frames; export one file per slice")
        if image.size != first.size or not np.allclose(image.spacing[:2], first.spacing[:2], atol=SAME_ORIENTATION):
            raise InputError(
                f"{where}: {image.file} and {first.file} have different sizes; remove the images of one size"
            )
        if not np.allclose(image.direction, first.direction, atol=SAME_ORIENTATION):
            raise InputError(
                f"{where}: {image.file} and {first.file} have different orientations; remove the images of one of them"
            )
    normal = first.direction[:, 2]
    series = sorted(series, key=lambda image: float(image.origin @ normal))
    _check_positions(where, series, normal)
    return series


def _check_positions(where: str, series: Series, normal: np.ndarray) -> None:
    """Raise InputError unless the slices are evenly spaced along the normal and not shifted sideways."""
    origins = np.array([image.origin for image in series])
    positions = origins @ normal
    steps = np.diff(positions)
    median_step = float(np.median(steps)) if len(steps) else 0.0
    for image, position, step in zip(series[1:], positions, steps, strict=False):
        if step < SAME_POSITION:
            raise InputError(
                f"{where}: several images at {position:.2f} mm, such as {image.file}; keep one image per position"
            )
    for position, step in zip(positions, steps, strict=False):
        if abs(step - median_step) > UNEVEN * median_step:
            raise InputError(
                f"{where}: slices lie {median_step:.2f} mm apart, but after {position:.2f} mm the next is at "
                f"{position + step:.2f} mm; add the missing slice, or remove the extra one"
            )
    shift = np.abs(origins - origins[0] - np.outer(positions - positions[0], normal)).max()
    if shift > series[0].spacing[:2].min() / 2:
        raise InputError(
            f"{where}: slices are shifted sideways by up to {shift:.2f} mm (tilted gantry); resample the series"
        )


def series_grid(file: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape ``(H, W, S)`` and affine (mm) of a series, read from headers. The affine's axes are NIfTI's: R, A, S."""
    series = ordered_series(file)
    first, last = series[0], series[-1]
    spacing = first.spacing.copy()
    if len(series) > 1:
        spacing[2] = np.linalg.norm(last.origin - first.origin) / (len(series) - 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = first.direction * spacing, first.origin
    return (*first.size[:2], len(series)), orientation_ras_lps(affine)


def read_series(file: str) -> Any:
    """The series of ``file`` as a float32 ITK image. Each slice may have its own rescale slope and intercept."""
    return itk.imread([image.file for image in ordered_series(file)], itk.F)


class SeriesReader(ITKReader):
    """MONAI's ITK reader for a series given by one file. MONAI's own takes a folder and reads only its first series."""

    def verify_suffix(self, filename: Any) -> bool:
        return all(is_dicom(name) for name in ensure_tuple(filename))

    def read(self, data: Any, **kwargs: Any) -> Any:
        images = [read_series(name) for name in ensure_tuple(data)]
        for image in images[1:]:
            image.CopyInformation(images[0])  # MONAI refuses rounding differences; check_headers compared the grids
        return images if len(images) > 1 else images[0]
